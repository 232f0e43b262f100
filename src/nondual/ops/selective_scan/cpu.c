/* The selective scan on a CPU, forward and backward: time in the inner loop, channels side by side in a vector.

   Source: Gu and Dao 2023 (2312.00752), equation 2 and Algorithm 2; the recomputation of section 3.3.2. Symbols: B
   batch, L steps, D channels, N states of a channel, G groups of channels that share B and C; Δ the step length after
   bias and softplus.

       forward    a_t = exp(Δ_t A),   h_t = a_t h_{t-1} + Δ_t u_t B_t,   y_t = C_t · h_t + D u_t,   out_t = y_t silu(z_t)

       backward   g_t = C_t dy_t + a_{t+1} g_{t+1}       the gradient of h_t, from the last step to the first
                  dC_t = Σ_d h_t dy_t      dB_t = Σ_d g_t Δ_t u_t      d(Δu)_t = Σ_n g_t B_t
                  d(ΔA)_t = g_t a_t h_{t-1}      dA = Σ_t Δ_t d(ΔA)_t      dΔ_t = Σ_n A d(ΔA)_t + u_t d(Δu)_t

   A task is one batch and up to WIDTH channels that lie in one group; it goes through time in chunks of STEPS. The
   forward pass keeps the state between chunks, and the backward pass computes the states of a chunk anew from there: in
   all B·L/STEPS·D·N numbers, never B·L·D·N. Who computes a task does not change what is computed, so that the result
   does not depend on the number of threads: sums over channels are kept for each task, and added by the caller.

   Compiled by cpu.py, which gives STEPS and WIDTH, and DOUBLE for float64. The layout of `struct scan` is its own. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif

#ifdef DOUBLE
typedef double real;
typedef int64_t bits;
enum { MANTISSA = 52, REACH = 1000 };
#else
typedef float real;
typedef int32_t bits;
enum { MANTISSA = 23, REACH = 120 };
#endif

enum { LANES = BYTES / sizeof(real), VECTORS = WIDTH / LANES };
typedef real vec __attribute__((vector_size(BYTES)));
typedef bits ivec __attribute__((vector_size(BYTES)));
#define INLINE static inline __attribute__((always_inline))

struct scan { /* eight bytes each; strides count numbers, and the last axis of each tensor is dense */
  int64_t batch, length, channels, states, unit; /* unit: channels that share both B and C */
  int64_t u_b, u_l, delta_b, delta_l, z_b, z_l, dy_b, dy_l;
  int64_t b_b, b_l, b_g, b_unit, c_b, c_l, c_g, c_unit; /* _unit: channels that share it; 0 where it is (D, N) */
  int64_t softplus, threads;
  /* in; null where it was not given */
  const real *u, *delta, *A, *B, *C, *D, *z, *bias, *state;
  const uint8_t *reset;
  /* out of the forward pass; the backward pass reads `kept`, (B, chunks - 1, D, N) */
  real *y, *last, *kept;
  /* the backward pass */
  const real *dy, *dlast;
  real *du, *ddelta, *dz, *dstate;    /* like u, and like state */
  real *dA, *dB, *dC, *dD, *dbias;    /* for each batch (B, D, N) or (B, D); dB and dC of time (B, tasks, L, N) */
};

/* --- vectors ---------------------------------------------------------------------------------------------------- */

INLINE vec splat(real x) { return x - (vec){0}; }
INLINE vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
INLINE vec absolute(vec x) { return (vec)((ivec)x & ~(ivec)splat(-(real)0.0)); }

INLINE vec load(const real *from, int64_t lanes) {
  vec x = {0};
  memcpy(&x, from, lanes == LANES ? sizeof x : lanes * sizeof(real));
  return x;
}

INLINE void store(real *to, vec x, int64_t lanes) { memcpy(to, &x, lanes == LANES ? sizeof x : lanes * sizeof(real)); }

INLINE vec gather(const real *from, int64_t stride, int64_t lanes) {
  vec x = {0};
  for (int64_t i = 0; i < lanes; i++) x[i] = from[i * stride];
  return x;
}

INLINE void scatter(real *to, int64_t stride, vec x, int64_t lanes) {
  for (int64_t i = 0; i < lanes; i++) to[i * stride] = x[i];
}

INLINE real sum(vec x) { /* in halves: always in the same order */
  real part[LANES];
  memcpy(part, &x, sizeof x);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

/* --- functions ---------------------------------------------------------------------------------------------------
   exp(x y) = 2^(x y log2 e), with y log2 e handed over in two parts, so that the product loses no digit where the
   machine fuses a multiplication and an addition. The integer part goes into the exponent; 2^f for |f| <= 1/2 is the
   polynomial of least relative error (2e-9; 3e-18 in float64), exactly 1 at 0. */

struct pair { vec high, low; };

INLINE struct pair in_base_2(vec y) {
  const double log2e = 1.4426950408889634;
  vec high = y * (real)log2e, rest;
  for (int i = 0; i < LANES; i++)
#ifdef DOUBLE
    rest[i] = __builtin_fma(y[i], log2e, -high[i]) + y[i] * 2.0355273740931032e-17;
#else
    rest[i] = (double)y[i] * log2e - (double)high[i];
#endif
  return (struct pair){high, rest};
}

struct split { vec fraction, whole; ivec exponent; };

INLINE struct split split(vec x, struct pair y) {
  const real magic = 1.5 * ((bits)1 << MANTISSA); /* added, it leaves no room for a fraction: the sum is rounded */
  vec shifted = x * y.high + magic, whole = shifted - magic;
  return (struct split){x * y.low + (x * y.high - whole), whole, (ivec)shifted};
}

INLINE vec power(vec f) {
#ifdef DOUBLE
  static const real c[] = {1, 0.69314718055994533, 0.240226506959101562, 0.0555041086648199223, 0.00961812910758834565,
                           0.00133335581467897767, 0.000154035304625016976, 0.0000152527334901089369,
                           1.32154330958915319e-6, 1.01781979769547459e-7, 7.07410457375380929e-9,
                           4.43528886506753653e-10};
#else
  static const real c[] = {1, 0.6931472057f, 0.2402264689f, 0.05550328782f, 0.009618488772f, 0.001339992998f,
                           0.0001534586402f};
#endif
  enum { DEGREE = sizeof c / sizeof *c - 1 };
  vec p = splat(c[DEGREE]);
#pragma GCC unroll 16
  for (int k = DEGREE - 1; k >= 0; k--) p = p * f + c[k];
  return p;
}

/* exp(x y) where |x y log2 e| < REACH: nothing to look out for. */
INLINE vec exp_near(vec x, struct pair y) {
  struct split s = split(x, y);
  return (vec)((ivec)power(s.fraction) + (s.exponent << MANTISSA));
}

/* exp(x y) for all numbers: NaN, both infinities, what overflows, what falls below the smallest normal number. */
INLINE vec exp_any(vec x, struct pair y) {
  struct split s = split(x, y);
  const bits bias = ((bits)1 << (8 * sizeof(real) - MANTISSA - 2)) - 1;
  const real far = bias + MANTISSA + 10;
  ivec near = absolute(s.whole) < far;
  ivec exponent = (s.exponent << (8 * sizeof(real) - 16)) >> (8 * sizeof(real) - 16); /* the low 16 bits, signed */
  ivec half = exponent >> 1; /* in two steps, since 2^exponent alone may be no number of this size */
  vec value = power(choose(near, s.fraction, splat(0)));
  value = value * (vec)((half + bias) << MANTISSA) * (vec)((exponent - half + bias) << MANTISSA);
  vec beyond = choose(s.whole < 0, splat(0), absolute(s.whole) * (real)(sizeof(real) == 8 ? 1e308 : 1e38f));
  return choose(near, value, beyond); /* a NaN is not near, and stays itself */
}

INLINE vec exponential(vec x) { return exp_any(x, in_base_2(splat(1))); }

INLINE vec sigmoid(vec x) { return 1 / (1 + exponential(-x)); }

/* max(x, 0) + log(1 + e), e = exp(-|x|); log(1 + e) = 2 artanh(w), w = e / (2 + e) <= 1/3, as a polynomial in w². */
INLINE vec softplus(vec x) {
#ifdef DOUBLE
  static const real c[] = {2, 0.666666666666661342, 0.400000000001903281, 0.285714285449251744, 0.222222241117479207,
                           0.18181739789289728, 0.153866354089553721, 0.133001032356614721, 0.121122423944885315,
                           0.0831571621208368894, 0.17059998387046489};
#else
  static const real c[] = {2, 0.6666667931f, 0.3999869103f, 0.2862071899f, 0.2139328299f, 0.2441295104f};
#endif
  enum { DEGREE = sizeof c / sizeof *c - 1 };
  vec e = exponential(-absolute(x)), w = e / (2 + e), w2 = w * w, p = splat(c[DEGREE]);
#pragma GCC unroll 16
  for (int k = DEGREE - 1; k >= 0; k--) p = p * w2 + c[k];
  return choose(x > 0, x, splat(0)) + w * p;
}

/* --- a task ------------------------------------------------------------------------------------------------------ */

struct task {
  int64_t batch, index, first, width, vectors; /* its channels: first … first + width */
  int64_t b_group, c_group;
};

static int64_t blocks_of(const struct scan *s) { return s->channels / s->unit * ((s->unit + WIDTH - 1) / WIDTH); }

static struct task task_of(const struct scan *s, int64_t i) {
  int64_t blocks = blocks_of(s), each = (s->unit + WIDTH - 1) / WIDTH;
  struct task k = {.batch = i / blocks, .index = i};
  int64_t block = i % blocks, within = block % each * WIDTH;
  k.first = block / each * s->unit + within;
  k.width = s->unit - within < WIDTH ? s->unit - within : WIDTH;
  k.vectors = (k.width + LANES - 1) / LANES;
  k.b_group = s->b_unit ? k.first / s->b_unit : 0;
  k.c_group = s->c_unit ? k.first / s->c_unit : 0;
  return k;
}

INLINE int64_t lanes_of(struct task k, int64_t v) { return k.width - v * LANES < LANES ? k.width - v * LANES : LANES; }

/* What a thread works with: one allocation, cut up. */
struct room {
  struct pair *A2;            /* (N, V) A log2 e */
  vec *A, *B, *C;             /* (N, V); B and C where they are (D, N) */
  vec *h, *g, *dA, *dB, *dC;  /* (N, V) */
  real *B_t, *C_t;            /* (N, STEPS), this chunk's */
  vec delta[VECTORS][STEPS], x[VECTORS][STEPS], y[VECTORS][STEPS]; /* x = Δ u */
  vec dy[VECTORS][STEPS], ddelta[VECTORS][STEPS], dx[VECTORS][STEPS];
  vec a[STEPS], hs[STEPS + 1], dB_t[STEPS], dC_t[STEPS];
  vec dD[VECTORS], dbias[VECTORS];
  real most[VECTORS][LANES];  /* the greatest |Δ| of the chunk */
  uint8_t reset[STEPS];
};

static struct room *make_room(int64_t states) {
  size_t fixed = (sizeof(struct room) + 63) / 64 * 64, table = states * VECTORS * sizeof(vec);
  size_t rows = (states * STEPS * sizeof(real) + 63) / 64 * 64;
  char *memory = aligned_alloc(64, fixed + 10 * table + 2 * rows);
  if (!memory) return NULL;
  struct room *r = (struct room *)memory;
  memory += fixed;
  r->A2 = (struct pair *)memory, memory += 2 * table;
  vec **tables[] = {&r->A, &r->B, &r->C, &r->h, &r->g, &r->dA, &r->dB, &r->dC};
  for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) *tables[i] = (vec *)memory, memory += table;
  r->B_t = (real *)memory, memory += rows;
  r->C_t = (real *)memory;
  return r;
}

/* Once for a task: A, and B and C where they do not change. */
static void enter(const struct scan *s, struct task k, struct room *r) {
  for (int64_t n = 0; n < s->states; n++)
    for (int64_t v = 0; v < k.vectors; v++) {
      int64_t i = n * VECTORS + v, at = (k.first + v * LANES) * s->states + n;
      r->A[i] = gather(s->A + at, s->states, lanes_of(k, v));
      r->A2[i] = in_base_2(r->A[i]);
      if (!s->b_unit) r->B[i] = gather(s->B + at, s->states, lanes_of(k, v));
      if (!s->c_unit) r->C[i] = gather(s->C + at, s->states, lanes_of(k, v));
    }
}

/* A table (N, V) from a tensor (…, D, N) at the task's first channel, and back. */
static void read_states(const struct scan *s, struct task k, const real *from, vec *to) {
  for (int64_t n = 0; n < s->states; n++)
    for (int64_t v = 0; v < k.vectors; v++)
      to[n * VECTORS + v] = from ? gather(from + v * LANES * s->states + n, s->states, lanes_of(k, v)) : splat(0);
}

static void write_states(const struct scan *s, struct task k, real *to, const vec *from) {
  for (int64_t n = 0; n < s->states; n++)
    for (int64_t v = 0; v < k.vectors; v++)
      scatter(to + v * LANES * s->states + n, s->states, from[n * VECTORS + v], lanes_of(k, v));
}

/* Where the batch and first channel of a task lie in (B, D, N), and those of a chunk in `kept`. */
INLINE int64_t place(const struct scan *s, struct task k) { return (k.batch * s->channels + k.first) * s->states; }

INLINE real *kept_at(const struct scan *s, struct task k, int64_t chunk) {
  int64_t between = (s->length + STEPS - 1) / STEPS - 1;
  return s->kept + ((k.batch * between + chunk - 1) * s->channels + k.first) * s->states;
}

INLINE vec step_length(const struct scan *s, struct task k, int64_t v, int64_t t, vec *before) {
  int64_t channel = k.first + v * LANES, lanes = lanes_of(k, v);
  vec x = load(s->delta + k.batch * s->delta_b + t * s->delta_l + channel, lanes);
  if (s->bias) x += load(s->bias + channel, lanes);
  *before = x;
  return s->softplus ? softplus(x) : x;
}

/* A chunk's Δ, Δ u, B, C and resets. */
static void read_chunk(const struct scan *s, struct task k, struct room *r, int64_t start, int64_t steps) {
  for (int64_t v = 0; v < k.vectors; v++) {
    vec most = {0}, raw;
    for (int64_t t = 0; t < steps; t++) {
      vec delta = step_length(s, k, v, start + t, &raw), far = absolute(delta);
      r->delta[v][t] = delta;
      r->x[v][t] = delta * load(s->u + k.batch * s->u_b + (start + t) * s->u_l + k.first + v * LANES, lanes_of(k, v));
      most = choose(far <= most, most, far); /* a NaN comes through */
    }
    memcpy(r->most[v], &most, sizeof most);
  }
  const real *B = s->B + k.batch * s->b_b + start * s->b_l + k.b_group * s->b_g;
  const real *C = s->C + k.batch * s->c_b + start * s->c_l + k.c_group * s->c_g;
  for (int64_t t = 0; t < steps; t++)
    for (int64_t n = 0; n < s->states; n++) {
      if (s->b_unit) r->B_t[n * STEPS + t] = B[t * s->b_l + n];
      if (s->c_unit) r->C_t[n * STEPS + t] = C[t * s->c_l + n];
    }
  if (s->reset)
    memcpy(r->reset, s->reset + k.batch * s->length + start, steps);
  else
    memset(r->reset, 0, steps);
}

/* Whether exp(Δ A) stays within reach of the plain form for a vector of channels, all through the chunk. */
INLINE int is_near(const struct room *r, int64_t n, int64_t v) {
  int near = 1;
  for (int i = 0; i < LANES; i++) {
    real x = r->most[v][i] * r->A2[n * VECTORS + v].high[i];
    near &= x < REACH && x > -REACH;
  }
  return near;
}

/* --- forward ----------------------------------------------------------------------------------------------------- */

/* One state of one vector of channels through one chunk. The last three arguments are known where it is inlined. */
INLINE void scan_chunk(struct room *r, int64_t n, int64_t v, int64_t steps, int near, int b_timed, int c_timed) {
  int64_t i = n * VECTORS + v;
  const struct pair A2 = r->A2[i];
  const real *B_t = r->B_t + n * STEPS, *C_t = r->C_t + n * STEPS;
  vec h = r->h[i];
  for (int64_t t = 0; t < steps; t++) {
    vec a = near ? exp_near(r->delta[v][t], A2) : exp_any(r->delta[v][t], A2);
    vec B = b_timed ? splat(B_t[t]) : r->B[i], C = c_timed ? splat(C_t[t]) : r->C[i];
    if (r->reset[t]) h = splat(0);
    h = a * h + r->x[v][t] * B;
    r->y[v][t] += C * h;
  }
  r->h[i] = h;
}

static void forward_task(const struct scan *s, struct task k, struct room *r) {
  enter(s, k, r);
  read_states(s, k, s->state ? s->state + place(s, k) : NULL, r->h);
  for (int64_t start = 0; start < s->length; start += STEPS) {
    int64_t steps = s->length - start < STEPS ? s->length - start : STEPS;
    if (start) write_states(s, k, kept_at(s, k, start / STEPS), r->h);
    read_chunk(s, k, r, start, steps);
    memset(r->y, 0, sizeof r->y);
    for (int64_t n = 0; n < s->states; n++)
      for (int64_t v = 0; v < k.vectors; v++) {
        if (!is_near(r, n, v)) scan_chunk(r, n, v, steps, 0, s->b_unit != 0, s->c_unit != 0);
        else if (s->b_unit && s->c_unit) scan_chunk(r, n, v, steps, 1, 1, 1);
        else scan_chunk(r, n, v, steps, 1, s->b_unit != 0, s->c_unit != 0);
      }
    for (int64_t v = 0; v < k.vectors; v++)
      for (int64_t t = 0; t < steps; t++) {
        int64_t channel = k.first + v * LANES, lanes = lanes_of(k, v), row = start + t;
        vec y = r->y[v][t];
        if (s->D) y += load(s->D + channel, lanes) * load(s->u + k.batch * s->u_b + row * s->u_l + channel, lanes);
        if (s->z) {
          vec z = load(s->z + k.batch * s->z_b + row * s->z_l + channel, lanes);
          y *= z * sigmoid(z);
        }
        store(s->y + (k.batch * s->length + row) * s->channels + channel, y, lanes);
      }
  }
  write_states(s, k, s->last + place(s, k), r->h);
}

/* --- backward ---------------------------------------------------------------------------------------------------- */

/* The states of a chunk anew, then time the other way. The last four arguments are known where it is inlined. */
INLINE void scan_chunk_back(
    struct room *r, int64_t n, int64_t v, int64_t steps, int near, int b_timed, int c_timed, int gated) {
  int64_t i = n * VECTORS + v;
  const struct pair A2 = r->A2[i];
  const real *B_t = r->B_t + n * STEPS, *C_t = r->C_t + n * STEPS;
  vec h = r->h[i], g = r->g[i], A = r->A[i], dA = {0}, dB = {0}, dC = {0};
  r->hs[0] = h;
  for (int64_t t = 0; t < steps; t++) {
    vec a = near ? exp_near(r->delta[v][t], A2) : exp_any(r->delta[v][t], A2);
    vec B = b_timed ? splat(B_t[t]) : r->B[i];
    if (r->reset[t]) h = splat(0);
    h = a * h + r->x[v][t] * B;
    r->a[t] = a;
    r->hs[t + 1] = h;
    if (gated) r->y[v][t] += (c_timed ? splat(C_t[t]) : r->C[i]) * h;
  }
  for (int64_t t = steps - 1; t >= 0; t--) {
    vec B = b_timed ? splat(B_t[t]) : r->B[i], C = c_timed ? splat(C_t[t]) : r->C[i];
    vec dy = r->dy[v][t], before = r->hs[t];
    if (c_timed) r->dC_t[t] += dy * h;
    else dC += dy * h;
    h = before;
    if (r->reset[t]) before = splat(0);
    g += C * dy;
    if (b_timed) r->dB_t[t] += g * r->x[v][t];
    else dB += g * r->x[v][t];
    r->dx[v][t] += g * B;
    g *= r->a[t];
    vec dstep = g * before;
    r->ddelta[v][t] += A * dstep;
    dA += r->delta[v][t] * dstep;
    if (r->reset[t]) g = splat(0);
  }
  r->g[i] = g;
  r->dA[i] += dA;
  if (!b_timed) r->dB[i] += dB;
  if (!c_timed) r->dC[i] += dC;
}

static void backward_task(const struct scan *s, struct task k, struct room *r) {
  enter(s, k, r);
  read_states(s, k, s->dlast ? s->dlast + place(s, k) : NULL, r->g);
  for (int64_t i = 0; i < s->states * VECTORS; i++) r->dA[i] = r->dB[i] = r->dC[i] = splat(0);
  memset(r->dD, 0, sizeof r->dD), memset(r->dbias, 0, sizeof r->dbias);
  for (int64_t chunk = (s->length - 1) / STEPS; chunk >= 0; chunk--) {
    int64_t start = chunk * STEPS, steps = s->length - start < STEPS ? s->length - start : STEPS;
    read_states(s, k, chunk ? kept_at(s, k, chunk) : s->state ? s->state + place(s, k) : NULL, r->h);
    read_chunk(s, k, r, start, steps);
    memset(r->y, 0, sizeof r->y), memset(r->ddelta, 0, sizeof r->ddelta), memset(r->dx, 0, sizeof r->dx);
    for (int64_t v = 0; v < k.vectors; v++)
      for (int64_t t = 0; t < steps; t++) {
        int64_t channel = k.first + v * LANES, lanes = lanes_of(k, v), row = start + t;
        vec dy = load(s->dy + k.batch * s->dy_b + row * s->dy_l + channel, lanes);
        if (s->z) {
          vec z = load(s->z + k.batch * s->z_b + row * s->z_l + channel, lanes);
          dy *= z * sigmoid(z);
        }
        r->dy[v][t] = dy;
      }
    for (int64_t n = 0; n < s->states; n++) {
      memset(r->dB_t, 0, sizeof r->dB_t), memset(r->dC_t, 0, sizeof r->dC_t);
      for (int64_t v = 0; v < k.vectors; v++) {
        int plain = is_near(r, n, v) && s->b_unit && s->c_unit;
        if (plain && s->z) scan_chunk_back(r, n, v, steps, 1, 1, 1, 1);
        else if (plain) scan_chunk_back(r, n, v, steps, 1, 1, 1, 0);
        else scan_chunk_back(r, n, v, steps, 0, s->b_unit != 0, s->c_unit != 0, s->z != NULL);
      }
      for (int64_t t = 0; t < steps; t++) {
        int64_t at = (k.index * s->length + start + t) * s->states + n;
        if (s->b_unit) s->dB[at] = sum(r->dB_t[t]);
        if (s->c_unit) s->dC[at] = sum(r->dC_t[t]);
      }
    }
    for (int64_t v = 0; v < k.vectors; v++) {
      vec dD = {0}, dbias = {0};
      for (int64_t t = 0; t < steps; t++) {
        int64_t channel = k.first + v * LANES, lanes = lanes_of(k, v), row = start + t;
        int64_t at = (k.batch * s->length + row) * s->channels + channel;
        vec u = load(s->u + k.batch * s->u_b + row * s->u_l + channel, lanes), raw;
        vec du = r->delta[v][t] * r->dx[v][t], ddelta = r->ddelta[v][t] + u * r->dx[v][t], y = r->y[v][t];
        if (s->D) {
          vec D = load(s->D + channel, lanes);
          du += D * r->dy[v][t], y += D * u, dD += u * r->dy[v][t];
        }
        if (s->softplus) {
          step_length(s, k, v, row, &raw);
          ddelta *= sigmoid(raw);
        }
        dbias += ddelta;
        store(s->du + at, du, lanes);
        store(s->ddelta + at, ddelta, lanes);
        if (s->z) {
          vec z = load(s->z + k.batch * s->z_b + row * s->z_l + channel, lanes), open = sigmoid(z);
          vec dout = load(s->dy + k.batch * s->dy_b + row * s->dy_l + channel, lanes);
          store(s->dz + at, dout * y * open * (1 + z * (1 - open)), lanes);
        }
      }
      r->dD[v] += dD, r->dbias[v] += dbias;
    }
  }
  write_states(s, k, s->dA + place(s, k), r->dA);
  if (!s->b_unit) write_states(s, k, s->dB + place(s, k), r->dB);
  if (!s->c_unit) write_states(s, k, s->dC + place(s, k), r->dC);
  if (s->dstate) write_states(s, k, s->dstate + place(s, k), r->g);
  for (int64_t v = 0; v < k.vectors; v++) {
    int64_t at = k.batch * s->channels + k.first + v * LANES;
    if (s->dD) store(s->dD + at, r->dD[v], lanes_of(k, v));
    if (s->dbias) store(s->dbias + at, r->dbias[v], lanes_of(k, v));
  }
}

/* --- threads -----------------------------------------------------------------------------------------------------
   Made for a call and gone after it: there is nothing that a fork could lose. */

struct work {
  const struct scan *scan;
  void (*run)(const struct scan *, struct task, struct room *);
  int64_t tasks;
  atomic_llong next;
  atomic_int failed;
};

static void *work_through(void *given) {
  struct work *w = given;
  struct room *r = make_room(w->scan->states);
  if (!r) {
    w->failed = 1;
    return NULL;
  }
  for (int64_t i; (i = w->next++) < w->tasks;) w->run(w->scan, task_of(w->scan, i), r);
  free(r);
  return NULL;
}

/* 0, or 1 where there is no memory left. */
static int share_out(const struct scan *s, void (*run)(const struct scan *, struct task, struct room *)) {
  enum { MOST = 256 };
  struct work w = {.scan = s, .run = run, .tasks = s->batch * blocks_of(s)};
  pthread_t others[MOST];
  int64_t wanted = s->threads < w.tasks ? s->threads : w.tasks, made = 0;
  while (made < wanted - 1 && made < MOST && !pthread_create(&others[made], NULL, work_through, &w)) made++;
  work_through(&w);
  for (int64_t i = 0; i < made; i++) pthread_join(others[i], NULL);
  return w.failed;
}

int forward(const struct scan *s) { return share_out(s, forward_task); }
int backward(const struct scan *s) { return share_out(s, backward_task); }
