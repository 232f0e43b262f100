/* The selective scan on a CPU, forward and backward: time in the inner loop, channels side by side in a vector.

   Source: Gu and Dao 2023 (2312.00752), equation 2 and Algorithm 2; the recomputation of section 3.3.2. Symbols: B
   batch, L steps, D channels, N states of a channel, G groups of channels that share B and C; Δ the step length after
   bias and softplus.

       forward    a_t = exp(Δ_t A),  h_t = a_t h_{t-1} + Δ_t u_t B_t,  y_t = C_t · h_t + D u_t,  out_t = y_t silu(z_t)

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
enum { TOGETHER = 4 }; /* states of a channel whose arithmetic the processor can overlap */
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
  real *dA, *dB, *dC, *dD, *dbias;    /* for each batch (B, D, N) or (B, D); dB and dC of time (B, L, tasks, N) */
};

/* --- vectors ---------------------------------------------------------------------------------------------------- */

INLINE vec splat(real x) { return x - (vec){0}; }
INLINE vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
INLINE vec absolute(vec x) { return (vec)((ivec)x & ~(ivec)splat(-(real)0.0)); }

typedef real loose __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias)); /* as it lies in a tensor */

INLINE vec gather(const real *from, int64_t stride, int64_t lanes) {
  vec x = {0};
  for (int64_t i = 0; i < lanes; i++) x[i] = from[i * stride];
  return x;
}

INLINE void scatter(real *to, int64_t stride, vec x, int64_t lanes) {
  for (int64_t i = 0; i < lanes; i++) to[i * stride] = x[i];
}

INLINE vec load(const real *from, int64_t lanes) {
  return lanes == LANES ? (vec)*(const loose *)from : gather(from, 1, lanes);
}

INLINE void store(real *to, vec x, int64_t lanes) {
  if (lanes == LANES) *(loose *)to = x;
  else scatter(to, 1, x, lanes);
}

typedef real half __attribute__((vector_size(BYTES / 2), may_alias));

INLINE real sum(const vec *x) { /* always in the same order */
  const half *h = (const half *)x, halves = h[0] + h[1];
  real total = 0;
  for (int i = 0; i < LANES / 2; i++) total += halves[i];
  return total;
}

INLINE real greatest(vec x) { /* a NaN comes through */
  real most = 0;
  for (int i = 0; i < LANES; i++) most = x[i] <= most ? most : x[i];
  return most;
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

/* max(x, 0) + log(1 + e), e = exp(-|x|); log(1 + e) = 2 artanh(w), w = e / (2 + e) <= 1/3, as a polynomial in w².
   Above 20 it is x itself, and its slope 1, as in torch. */
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
  return choose(x > 20, x, choose(x > 0, x, splat(0)) + w * p);
}

INLINE vec softplus_slope(vec x) { return choose(x > 20, splat(1), sigmoid(x)); }

/* --- a task ------------------------------------------------------------------------------------------------------ */

struct task {
  int64_t batch, block, first, width, vectors; /* its channels: first … first + width */
  int64_t b_group, c_group;
};

static int64_t blocks_of(const struct scan *s) { return s->channels / s->unit * ((s->unit + WIDTH - 1) / WIDTH); }

static struct task task_of(const struct scan *s, int64_t i) {
  int64_t blocks = blocks_of(s), each = (s->unit + WIDTH - 1) / WIDTH;
  struct task k = {.batch = i / blocks, .block = i % blocks};
  int64_t within = k.block % each * WIDTH;
  k.first = k.block / each * s->unit + within;
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
  real *reach;                /* (N, V) the greatest |A log2 e| over all lanes */
  real *B_t, *C_t;            /* (N, STEPS), this chunk's */
  /* What belongs to one step lies together: arrays of STEPS vectors would all fall on the same lines of the cache. */
  struct step { vec delta, x, y, dy, ddelta, dx; } at[VECTORS][STEPS]; /* x = Δ u */
  struct { vec a, before; } path[STEPS][TOGETHER]; /* before: h of the last step, be it forgotten in this or not */
  struct { vec dB, dC; } sums[STEPS][TOGETHER];
  vec dD[VECTORS], dbias[VECTORS];
  real most[VECTORS];         /* the greatest |Δ| of the chunk, over all lanes */
  uint8_t reset[STEPS];
};

static struct room *make_room(int64_t states) {
  size_t fixed = (sizeof(struct room) + 63) / 64 * 64, table = states * VECTORS * sizeof(vec);
  size_t rows = (states * STEPS * sizeof(real) + 63) / 64 * 64;
  char *memory = aligned_alloc(64, fixed + 10 * table + 3 * rows);
  if (!memory) return NULL;
  struct room *r = (struct room *)memory;
  memory += fixed;
  r->A2 = (struct pair *)memory, memory += 2 * table;
  vec **tables[] = {&r->A, &r->B, &r->C, &r->h, &r->g, &r->dA, &r->dB, &r->dC};
  for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) *tables[i] = (vec *)memory, memory += table;
  r->B_t = (real *)memory, memory += rows;
  r->reach = (real *)memory, memory += rows;
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
      r->reach[i] = greatest(absolute(r->A2[i].high));
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

/* A chunk's Δ, Δ u, B, C and resets. The same rows `ahead` steps on are asked for: they lie too far apart in memory for
   the processor to foresee them. */
static void read_chunk(
    const struct scan *s, struct task k, struct room *r, int64_t start, int64_t steps, int64_t ahead) {
  for (int64_t v = 0; v < k.vectors; v++) {
    vec most = {0}, raw;
    for (int64_t t = 0; t < steps; t++) {
      int64_t row = start + t, channel = k.first + v * LANES;
      const real *u = s->u + k.batch * s->u_b + channel, *d = s->delta + k.batch * s->delta_b + channel;
      __builtin_prefetch(u + (row + ahead) * s->u_l, 0, 2);
      __builtin_prefetch(d + (row + ahead) * s->delta_l, 0, 2);
      vec delta = step_length(s, k, v, row, &raw), far = absolute(delta);
      r->at[v][t] = (struct step){.delta = delta, .x = delta * load(u + row * s->u_l, lanes_of(k, v))};
      most = choose(far <= most, most, far); /* a NaN comes through */
    }
    r->most[v] = greatest(most);
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

/* Whether exp(Δ A) stays within reach of the plain form for `count` states, from n on, all through the chunk. */
INLINE int is_near(const struct room *r, int64_t n, int64_t count, int64_t v) {
  int near = 1;
  for (int64_t j = n; j < n + count; j++) near &= r->most[v] * r->reach[j * VECTORS + v] < REACH;
  return near;
}

/* --- forward ----------------------------------------------------------------------------------------------------- */

/* `count` states of one vector of channels, from n on, through one chunk; those together that the processor can keep in
   flight at once. The last four arguments are known where it is inlined. */
INLINE void scan_chunk(
    struct room *r, int64_t n, int64_t v, int64_t steps, int count, int near, int b_timed, int c_timed) {
  const int64_t i = n * VECTORS + v;
  const real *B_t = r->B_t + n * STEPS, *C_t = r->C_t + n * STEPS;
  struct pair A2[TOGETHER];
  vec h[TOGETHER];
  for (int j = 0; j < count; j++) A2[j] = r->A2[i + j * VECTORS], h[j] = r->h[i + j * VECTORS];
  /* --8<-- [start:forward] */
  for (int64_t t = 0; t < steps; t++) {
    vec y = r->at[v][t].y, delta = r->at[v][t].delta, x = r->at[v][t].x;
    if (r->reset[t])
      for (int j = 0; j < count; j++) h[j] = splat(0);
#pragma GCC unroll 8
    for (int j = 0; j < count; j++) {
      vec B = b_timed ? splat(B_t[j * STEPS + t]) : r->B[i + j * VECTORS];
      vec C = c_timed ? splat(C_t[j * STEPS + t]) : r->C[i + j * VECTORS];
      vec a = near ? exp_near(delta, A2[j]) : exp_any(delta, A2[j]);
      h[j] = a * h[j] + x * B;
      y += C * h[j];
    }
    r->at[v][t].y = y;
  }
  /* --8<-- [end:forward] */
  for (int j = 0; j < count; j++) r->h[i + j * VECTORS] = h[j];
}

static void forward_task(const struct scan *s, struct task k, struct room *r) {
  enter(s, k, r);
  read_states(s, k, s->state ? s->state + place(s, k) : NULL, r->h);
  for (int64_t start = 0; start < s->length; start += STEPS) {
    int64_t steps = s->length - start < STEPS ? s->length - start : STEPS;
    if (start) write_states(s, k, kept_at(s, k, start / STEPS), r->h);
    read_chunk(s, k, r, start, steps, STEPS);
    for (int64_t v = 0; v < k.vectors; v++)
      for (int64_t n = 0, count; n < s->states; n += count) {
        int plain = s->b_unit && s->c_unit && n + TOGETHER <= s->states && is_near(r, n, TOGETHER, v);
        count = plain ? TOGETHER : 1;
        if (plain) scan_chunk(r, n, v, steps, TOGETHER, 1, 1, 1);
        else scan_chunk(r, n, v, steps, 1, 0, s->b_unit != 0, s->c_unit != 0);
      }
    for (int64_t v = 0; v < k.vectors; v++)
      for (int64_t t = 0; t < steps; t++) {
        int64_t channel = k.first + v * LANES, lanes = lanes_of(k, v), row = start + t;
        vec y = r->at[v][t].y;
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

/* The states of a chunk anew, then time the other way; otherwise as scan_chunk. */
INLINE void scan_chunk_back(
    struct room *r, int64_t n, int64_t v, int64_t steps, int count, int near, int b_timed, int c_timed, int gated) {
  const int64_t i = n * VECTORS + v;
  const real *B_t = r->B_t + n * STEPS, *C_t = r->C_t + n * STEPS;
  struct pair A2[TOGETHER];
  vec h[TOGETHER], g[TOGETHER], A[TOGETHER], dA[TOGETHER], dB[TOGETHER], dC[TOGETHER];
  for (int j = 0; j < count; j++) {
    int64_t at = i + j * VECTORS;
    A2[j] = r->A2[at], A[j] = r->A[at], g[j] = r->g[at], h[j] = r->h[at];
    dA[j] = dB[j] = dC[j] = splat(0);
  }
  for (int64_t t = 0; t < steps; t++) {
    vec delta = r->at[v][t].delta, x = r->at[v][t].x, y = {0};
    for (int j = 0; j < count; j++) r->path[t][j].before = h[j];
    if (r->reset[t])
      for (int j = 0; j < count; j++) h[j] = splat(0);
#pragma GCC unroll 8
    for (int j = 0; j < count; j++) {
      vec B = b_timed ? splat(B_t[j * STEPS + t]) : r->B[i + j * VECTORS];
      vec a = near ? exp_near(delta, A2[j]) : exp_any(delta, A2[j]);
      r->path[t][j].a = a;
      h[j] = a * h[j] + x * B;
      if (gated) y += (c_timed ? splat(C_t[j * STEPS + t]) : r->C[i + j * VECTORS]) * h[j];
    }
    if (gated) r->at[v][t].y += y;
  }
  /* --8<-- [start:backward] */
  for (int64_t t = steps - 1; t >= 0; t--) {
    struct step *at = &r->at[v][t];
    vec delta = at->delta, x = at->x, dy = at->dy, dx = at->dx, ddelta = at->ddelta;
#pragma GCC unroll 8
    for (int j = 0; j < count; j++) {
      vec B = b_timed ? splat(B_t[j * STEPS + t]) : r->B[i + j * VECTORS];
      vec C = c_timed ? splat(C_t[j * STEPS + t]) : r->C[i + j * VECTORS];
      if (c_timed) r->sums[t][j].dC += dy * h[j];
      else dC[j] += dy * h[j];
      h[j] = r->path[t][j].before;
      g[j] += C * dy;
      if (b_timed) r->sums[t][j].dB += g[j] * x;
      else dB[j] += g[j] * x;
      dx += g[j] * B;
      g[j] = r->reset[t] ? splat(0) : g[j] * r->path[t][j].a;
      vec dstep = r->reset[t] ? splat(0) : g[j] * h[j];
      ddelta += A[j] * dstep;
      dA[j] += delta * dstep;
    }
    at->dx = dx, at->ddelta = ddelta;
  }
  /* --8<-- [end:backward] */
  for (int j = 0; j < count; j++) {
    int64_t at = i + j * VECTORS;
    r->g[at] = g[j], r->dA[at] += dA[j];
    if (!b_timed) r->dB[at] += dB[j];
    if (!c_timed) r->dC[at] += dC[j];
  }
}

static void backward_task(const struct scan *s, struct task k, struct room *r) {
  enter(s, k, r);
  read_states(s, k, s->dlast ? s->dlast + place(s, k) : NULL, r->g);
  for (int64_t i = 0; i < s->states * VECTORS; i++) r->dA[i] = r->dB[i] = r->dC[i] = splat(0);
  memset(r->dD, 0, sizeof r->dD), memset(r->dbias, 0, sizeof r->dbias);
  for (int64_t chunk = (s->length - 1) / STEPS; chunk >= 0; chunk--) {
    int64_t start = chunk * STEPS, steps = s->length - start < STEPS ? s->length - start : STEPS;
    read_states(s, k, chunk ? kept_at(s, k, chunk) : s->state ? s->state + place(s, k) : NULL, r->h);
    read_chunk(s, k, r, start, steps, -STEPS);
    for (int64_t v = 0; v < k.vectors; v++)
      for (int64_t t = 0; t < steps; t++) {
        int64_t channel = k.first + v * LANES, lanes = lanes_of(k, v), row = start + t;
        vec dy = load(s->dy + k.batch * s->dy_b + row * s->dy_l + channel, lanes);
        if (s->z) {
          vec z = load(s->z + k.batch * s->z_b + row * s->z_l + channel, lanes);
          dy *= z * sigmoid(z);
        }
        r->at[v][t].dy = dy;
      }
    for (int64_t n = 0, count; n < s->states; n += count) {
      int plain = s->b_unit && s->c_unit && n + TOGETHER <= s->states;
      for (int64_t v = 0; v < k.vectors; v++) plain = plain && is_near(r, n, TOGETHER, v);
      count = plain ? TOGETHER : 1;
      memset(r->sums, 0, sizeof r->sums);
      for (int64_t v = 0; v < k.vectors; v++)
        if (!plain) scan_chunk_back(r, n, v, steps, 1, 0, s->b_unit != 0, s->c_unit != 0, s->z != NULL);
        else if (s->z) scan_chunk_back(r, n, v, steps, TOGETHER, 1, 1, 1, 1);
        else scan_chunk_back(r, n, v, steps, TOGETHER, 1, 1, 1, 0);
      for (int64_t t = 0; t < steps; t++)
        for (int64_t j = 0; j < count; j++) {
          int64_t at = ((k.batch * s->length + start + t) * blocks_of(s) + k.block) * s->states + n + j;
          if (s->b_unit) s->dB[at] = sum(&r->sums[t][j].dB);
          if (s->c_unit) s->dC[at] = sum(&r->sums[t][j].dC);
        }
    }
    for (int64_t v = 0; v < k.vectors; v++) {
      vec dD = {0}, dbias = {0};
      for (int64_t t = 0; t < steps; t++) {
        int64_t channel = k.first + v * LANES, lanes = lanes_of(k, v), row = start + t;
        int64_t at = (k.batch * s->length + row) * s->channels + channel;
        vec u = load(s->u + k.batch * s->u_b + row * s->u_l + channel, lanes), raw;
        const struct step *now = &r->at[v][t];
        vec du = now->delta * now->dx, ddelta = now->ddelta + u * now->dx, y = now->y;
        if (s->D) {
          vec D = load(s->D + channel, lanes);
          du += D * now->dy, y += D * u, dD += u * now->dy;
        }
        if (s->softplus) {
          step_length(s, k, v, row, &raw);
          ddelta *= softplus_slope(raw);
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
