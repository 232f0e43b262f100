/* The selective scan on a CPU, forward and backward: time in the inner loop, channels side by side in a vector.

   Source: Gu and Dao 2023 (2312.00752), equation 2 and Algorithm 2; the recomputation of section 3.3.2. Symbols: B
   batch, L steps, D channels, N states of a channel, G groups of channels that share B and C; Δ the step length after
   bias and softplus.

       forward    a_t = exp(Δ_t A),  h_t = a_t h_{t-1} + Δ_t u_t B_t,  y_t = C_t · h_t + D u_t,  out_t = y_t silu(z_t)

       backward   g_t = C_t dy_t + a_{t+1} g_{t+1}       the gradient of h_t, from the last step to the first
                  dC_t = Σ_d h_t dy_t      dB_t = Σ_d g_t Δ_t u_t      d(Δu)_t = Σ_n g_t B_t
                  d(ΔA)_t = g_t a_t h_{t-1}      dA = Σ_t Δ_t d(ΔA)_t      dΔ_t = Σ_n A d(ΔA)_t + u_t d(Δu)_t

   A block is one sequence of the batch and up to WIDTH channels that lie in one group. Time is cut into chunks of STEPS.
   The forward pass saves the state between chunks (`checkpoints`), and the backward pass computes the states within a
   chunk again from there: in all B·L/STEPS·D·N numbers, never B·L·D·N.

   A thread takes a task: several neighbouring blocks, all through one chunk before any goes on to the next. Their rows
   lie side by side in memory, so each page is looked up once instead of once for each block. How blocks are put into
   tasks does not change what is computed, so the result does not depend on the number of threads: sums over channels
   are written for each block, and the caller adds them.

   Numbers that are not finite follow the equations, and stay in the channels that they belong to.

   Compiled by build.py, which defines STEPS and WIDTH, and DOUBLE for float64; loop.py fills `struct scan`. All of it is
   one file: the inner loops are inlined into what calls them, and one hash tells whether a compiled library fits it. */

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
  /* read; null where it was not given */
  const real *u, *delta, *A, *B, *C, *D, *z, *bias, *state;
  const uint8_t *reset;
  /* written by the forward pass; the backward pass reads `checkpoints`, states between chunks (B, chunks - 1, D, N) */
  real *y, *last, *checkpoints;
  /* of the backward pass: the gradients that come in, and those that it writes */
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

/* The greater of two magnitudes, lane by lane, and the greatest of all lanes. They are compared as integers, whose order
   is that of the numbers with infinity above all numbers and NaN above infinity: a NaN stays to the end. Compared as
   numbers it would lose to whatever comes next. */
INLINE vec greater(vec x, vec y) { return choose((ivec)x > (ivec)y, x, y); }

INLINE real greatest(vec x) {
  ivec magnitudes = (ivec)x;
  int which = 0;
  for (int i = 1; i < LANES; i++) which = magnitudes[i] > magnitudes[which] ? i : which;
  return x[which];
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

/* exp(x y) where |x y log2 e| < REACH: the result is a normal number, and no case needs care. */
INLINE vec exp_near(vec x, struct pair y) {
  struct split s = split(x, y);
  return (vec)((ivec)power(s.fraction) + (s.exponent << MANTISSA));
}

/* exp(x y) for all numbers: NaN, both infinities, what overflows, what falls below the smallest normal number. */
INLINE vec exp_any(vec x, struct pair y) {
  struct split s = split(x, y);
  const bits bias = ((bits)1 << (8 * sizeof(real) - MANTISSA - 2)) - 1;
  const real far = bias + MANTISSA + 10;
  ivec near = absolute(s.whole) < far; /* not a NaN */
  ivec exponent = (s.exponent << (8 * sizeof(real) - 16)) >> (8 * sizeof(real) - 16); /* the low 16 bits, signed */
  ivec half = exponent >> 1; /* in two steps, since 2^exponent alone may be no number of this size */
  vec value = power(choose(near, s.fraction, splat(0)));
  value = value * (vec)((half + bias) << MANTISSA) * (vec)((exponent - half + bias) << MANTISSA);
  vec beyond = choose(s.whole < 0, splat(0), absolute(s.whole) * (real)(sizeof(real) == 8 ? 1e308 : 1e38f));
  return choose(near, value, beyond); /* `beyond` of a NaN is NaN */
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

/* --- blocks and the memory to work in ----------------------------------------------------------------------------- */

struct block {
  int64_t batch, index, first, width, vectors; /* its channels: first … first + width; index within its sequence */
  int64_t b_group, c_group;
};

static int64_t blocks_of(const struct scan *s) { return s->channels / s->unit * ((s->unit + WIDTH - 1) / WIDTH); }

static struct block block_of(const struct scan *s, int64_t batch, int64_t index) {
  int64_t each = (s->unit + WIDTH - 1) / WIDTH, within = index % each * WIDTH;
  struct block k = {.batch = batch, .index = index, .first = index / each * s->unit + within};
  k.width = s->unit - within < WIDTH ? s->unit - within : WIDTH;
  k.vectors = (k.width + LANES - 1) / LANES;
  k.b_group = s->b_unit ? k.first / s->b_unit : 0;
  k.c_group = s->c_unit ? k.first / s->c_unit : 0;
  return k;
}

INLINE int64_t lanes_of(struct block k, int64_t v) {
  return k.width - v * LANES < LANES ? k.width - v * LANES : LANES;
}

/* The memory that a thread works in: one allocation, divided up. Each block of a task has tables of its own, and
   turn_to points at those of one block; everything else is used by one block after another. */
struct room {
  struct pair *A2;            /* (N, V) A log2 e */
  vec *A, *B, *C;             /* (N, V); B and C where they are (D, N) */
  vec *h, *g, *dA, *dB, *dC;  /* (N, V) */
  real *reach;                /* (N, V) the greatest |A log2 e| over all lanes */
  vec *dD, *dbias;            /* (V) */
  real *B_t, *C_t;            /* (N, STEPS), of this chunk and of b_group and c_group */
  int64_t b_group, c_group;
  int b_finite, c_finite;
  /* What belongs to one step lies together: arrays of STEPS vectors would all fall on the same lines of the cache. */
  struct step { vec delta, x, y, dy, ddelta, dx; } at[VECTORS][STEPS]; /* x = Δ u */
  struct { vec a, before; } path[STEPS][TOGETHER]; /* before: h of the last step, whether or not this one resets it */
  struct { vec dB, dC; } sums[STEPS][TOGETHER];
  real most[VECTORS];         /* the greatest |Δ| of the chunk, over all lanes */
  uint8_t reset[STEPS];
  char *tables;
};

INLINE size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

static size_t bytes_of_tables(int64_t states) {
  return (10 * states + 2) * VECTORS * sizeof(vec) + whole_lines(states * VECTORS * sizeof(real));
}

static struct room *make_room(int64_t states, int64_t blocks) {
  size_t fixed = whole_lines(sizeof(struct room)), rows = whole_lines(states * STEPS * sizeof(real));
  char *memory = aligned_alloc(64, fixed + 2 * rows + blocks * bytes_of_tables(states));
  if (!memory) return NULL;
  struct room *r = (struct room *)memory;
  r->B_t = (real *)(memory + fixed);
  r->C_t = (real *)(memory + fixed + rows);
  r->tables = memory + fixed + 2 * rows;
  return r;
}

static void turn_to(struct room *r, int64_t block, int64_t states) {
  char *memory = r->tables + block * bytes_of_tables(states);
  size_t table = states * VECTORS * sizeof(vec);
  r->A2 = (struct pair *)memory, memory += 2 * table;
  vec **tables[] = {&r->A, &r->B, &r->C, &r->h, &r->g, &r->dA, &r->dB, &r->dC};
  for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) *tables[i] = (vec *)memory, memory += table;
  r->dD = (vec *)memory, memory += VECTORS * sizeof(vec);
  r->dbias = (vec *)memory, memory += VECTORS * sizeof(vec);
  r->reach = (real *)memory;
}

/* Once for a block: A, and B and C where they do not change with time. */
static void enter(const struct scan *s, struct block k, struct room *r) {
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

/* A table (N, V) from a tensor (…, D, N) at the block's first channel, and back. */
static void read_states(const struct scan *s, struct block k, const real *from, vec *to) {
  for (int64_t n = 0; n < s->states; n++)
    for (int64_t v = 0; v < k.vectors; v++)
      to[n * VECTORS + v] = from ? gather(from + v * LANES * s->states + n, s->states, lanes_of(k, v)) : splat(0);
}

static void write_states(const struct scan *s, struct block k, real *to, const vec *from) {
  for (int64_t n = 0; n < s->states; n++)
    for (int64_t v = 0; v < k.vectors; v++)
      scatter(to + v * LANES * s->states + n, s->states, from[n * VECTORS + v], lanes_of(k, v));
}

/* Where a block's first channel lies in (B, D, N), and in `checkpoints` before a chunk other than the first. */
INLINE int64_t place(const struct scan *s, struct block k) { return (k.batch * s->channels + k.first) * s->states; }

INLINE real *checkpoint_at(const struct scan *s, struct block k, int64_t chunk) {
  int64_t between = (s->length + STEPS - 1) / STEPS - 1;
  return s->checkpoints + ((k.batch * between + chunk - 1) * s->channels + k.first) * s->states;
}

INLINE vec step_length(const struct scan *s, struct block k, int64_t v, int64_t t, vec *before) {
  int64_t channel = k.first + v * LANES, lanes = lanes_of(k, v);
  vec x = load(s->delta + k.batch * s->delta_b + t * s->delta_l + channel, lanes);
  if (s->bias) x += load(s->bias + channel, lanes);
  *before = x;
  return s->softplus ? softplus(x) : x;
}

/* A chunk's rows of B or C, turned to (N, STEPS), and whether all their numbers are finite. */
static int read_rows(const real *from, int64_t stride, int64_t steps, int64_t states, real *to) {
  real zero = 0;
  for (int64_t t = 0; t < steps; t++)
    for (int64_t n = 0; n < states; n++) {
      real x = from[t * stride + n];
      to[n * STEPS + t] = x;
      zero += 0 * x; /* NaN, once x is not finite */
    }
  return zero == 0;
}

/* Before the blocks of a task go through a chunk. */
static void enter_chunk(const struct scan *s, int64_t batch, struct room *r, int64_t start, int64_t steps) {
  r->b_group = r->c_group = -1;
  r->b_finite = r->c_finite = 1;
  if (s->reset) memcpy(r->reset, s->reset + batch * s->length + start, steps);
  else memset(r->reset, 0, steps);
}

/* A chunk's Δ and Δ u, and B and C where the block before had others. */
static void read_chunk(const struct scan *s, struct block k, struct room *r, int64_t start, int64_t steps) {
  for (int64_t v = 0; v < k.vectors; v++) {
    vec most = {0}, raw;
    for (int64_t t = 0; t < steps; t++) {
      int64_t row = start + t, channel = k.first + v * LANES;
      const real *u = s->u + k.batch * s->u_b + channel;
      vec delta = step_length(s, k, v, row, &raw);
      r->at[v][t] = (struct step){.delta = delta, .x = delta * load(u + row * s->u_l, lanes_of(k, v))};
      most = greater(absolute(delta), most);
    }
    r->most[v] = greatest(most);
  }
  if (s->b_unit && r->b_group != k.b_group) {
    const real *B = s->B + k.batch * s->b_b + start * s->b_l + k.b_group * s->b_g;
    r->b_finite = read_rows(B, s->b_l, steps, s->states, r->B_t), r->b_group = k.b_group;
  }
  if (s->c_unit && r->c_group != k.c_group) {
    const real *C = s->C + k.batch * s->c_b + start * s->c_l + k.c_group * s->c_g;
    r->c_finite = read_rows(C, s->c_l, steps, s->states, r->C_t), r->c_group = k.c_group;
  }
}

/* Whether the plain form serves for the TOGETHER states from n on, all through the chunk: B and C change with time and
   are finite, and exp(Δ A) is within reach of exp_near. */
INLINE int is_plain(const struct scan *s, const struct room *r, int64_t n, int64_t v) {
  if (!s->b_unit || !s->c_unit || n + TOGETHER > s->states) return 0;
  int plain = r->b_finite & r->c_finite;
  for (int64_t j = n; j < n + TOGETHER; j++) plain &= r->most[v] * r->reach[j * VECTORS + v] < REACH; /* not a NaN */
  return plain;
}

/* Rows that will be read or written soon. They lie too far apart in memory for the processor to foresee them, so they
   are prefetched, a few at each step: all of them at once would wait for memory while nothing is computed. */
struct rows { const real *from; int64_t stride, count; };
struct ahead { struct rows of[4]; int64_t count; };

/* `count` rows of one vector of channels from row `first` of a tensor on. */
INLINE void add_rows(struct ahead *ahead, const real *tensor, int64_t stride, int64_t first, int64_t count) {
  ahead->of[ahead->count++] = (struct rows){tensor + first * stride, stride, count};
}

/* The share of a pass, which are counted from 0. A vector of channels goes through a chunk at least once for every
   TOGETHER states, and those passes have equal shares; where there are more passes, the last ones have none. */
INLINE struct ahead share_of(const struct ahead *all, int64_t states, int64_t pass) {
  int64_t passes = (states + TOGETHER - 1) / TOGETHER, each = (all->count + passes - 1) / passes;
  struct ahead share = {.count = 0};
  for (int64_t i = pass * each; i < (pass + 1) * each && i < all->count; i++) share.of[share.count++] = all->of[i];
  return share;
}

INLINE void prefetch(const struct ahead *ahead, int64_t t) {
  for (int64_t i = 0; i < ahead->count; i++)
    if (t < ahead->of[i].count) __builtin_prefetch(ahead->of[i].from + t * ahead->of[i].stride, 0, 2);
}

/* --- forward ----------------------------------------------------------------------------------------------------- */

/* `count` states of one vector of channels, from n on, through one chunk: as many together as the processor can keep in
   flight at once. The last four arguments are constants where it is inlined. */
INLINE void scan_chunk(struct room *r, const struct ahead *ahead, int64_t n, int64_t v, int64_t steps, int count,
                       int near, int b_timed, int c_timed) {
  const int64_t i = n * VECTORS + v;
  const real *B_t = r->B_t + n * STEPS, *C_t = r->C_t + n * STEPS;
  struct pair A2[TOGETHER];
  vec h[TOGETHER];
  for (int j = 0; j < count; j++) A2[j] = r->A2[i + j * VECTORS], h[j] = r->h[i + j * VECTORS];
  /* --8<-- [start:forward] */
  for (int64_t t = 0; t < steps; t++) {
    prefetch(ahead, t);
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

/* What the forward pass writes after this chunk's computation, and what it reads for the next chunk. */
static struct ahead forward_ahead(const struct scan *s, struct block k, int64_t v, int64_t start, int64_t steps) {
  int64_t channel = k.first + v * LANES, next = start + STEPS, left = s->length - next;
  int64_t rows = left < STEPS ? left : STEPS;
  struct ahead all = {.count = 0};
  add_rows(&all, s->y + k.batch * s->length * s->channels + channel, s->channels, start, steps);
  if (left <= 0) return all;
  add_rows(&all, s->u + k.batch * s->u_b + channel, s->u_l, next, rows);
  add_rows(&all, s->delta + k.batch * s->delta_b + channel, s->delta_l, next, rows);
  if (s->z) add_rows(&all, s->z + k.batch * s->z_b + channel, s->z_l, next, rows);
  return all;
}

static void forward_block(const struct scan *s, struct block k, struct room *r, int64_t start, int64_t steps) {
  if (start) write_states(s, k, checkpoint_at(s, k, start / STEPS), r->h);
  read_chunk(s, k, r, start, steps);
  for (int64_t v = 0; v < k.vectors; v++) {
    struct ahead all = forward_ahead(s, k, v, start, steps);
    for (int64_t n = 0, count, pass = 0; n < s->states; n += count, pass++) {
      struct ahead share = share_of(&all, s->states, pass);
      int plain = is_plain(s, r, n, v);
      count = plain ? TOGETHER : 1;
      if (plain) scan_chunk(r, &share, n, v, steps, TOGETHER, 1, 1, 1);
      else scan_chunk(r, &share, n, v, steps, 1, 0, s->b_unit != 0, s->c_unit != 0);
    }
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

static void forward_task(const struct scan *s, int64_t batch, int64_t first, int64_t blocks, struct room *r) {
  for (int64_t i = 0; i < blocks; i++) {
    struct block k = block_of(s, batch, first + i);
    turn_to(r, i, s->states);
    enter(s, k, r);
    read_states(s, k, s->state ? s->state + place(s, k) : NULL, r->h);
  }
  for (int64_t start = 0; start < s->length; start += STEPS) {
    int64_t steps = s->length - start < STEPS ? s->length - start : STEPS;
    enter_chunk(s, batch, r, start, steps);
    for (int64_t i = 0; i < blocks; i++) {
      turn_to(r, i, s->states);
      forward_block(s, block_of(s, batch, first + i), r, start, steps);
    }
  }
  for (int64_t i = 0; i < blocks; i++) {
    struct block k = block_of(s, batch, first + i);
    turn_to(r, i, s->states);
    write_states(s, k, s->last + place(s, k), r->h);
  }
}

/* --- backward ---------------------------------------------------------------------------------------------------- */

/* The states of a chunk again, then time from the last step to the first; otherwise as scan_chunk. Lanes beyond the
   block's channels hold zeros, and add nothing to the sums over channels, unless B or C is not finite (0 · inf is NaN):
   then `near` is 0, and they are masked. */
INLINE void scan_chunk_back(struct room *r, int64_t n, int64_t v, int64_t lanes, int64_t steps, int count, int near,
                            int b_timed, int c_timed, int gated) {
  const int64_t i = n * VECTORS + v;
  const real *B_t = r->B_t + n * STEPS, *C_t = r->C_t + n * STEPS;
  struct pair A2[TOGETHER];
  vec h[TOGETHER], g[TOGETHER], A[TOGETHER], dA[TOGETHER], dB[TOGETHER], dC[TOGETHER];
  for (int j = 0; j < count; j++) {
    int64_t at = i + j * VECTORS;
    A2[j] = r->A2[at], A[j] = r->A[at], g[j] = r->g[at], h[j] = r->h[at];
    dA[j] = dB[j] = dC[j] = splat(0);
  }
  ivec within = {0};
  for (int lane = 0; lane < LANES; lane++) within[lane] = -(lane < lanes);
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
      if (c_timed) r->sums[t][j].dC += near ? dy * h[j] : choose(within, dy * h[j], splat(0));
      else dC[j] += dy * h[j];
      h[j] = r->path[t][j].before;
      g[j] += C * dy;
      if (b_timed) r->sums[t][j].dB += near ? g[j] * x : choose(within, g[j] * x, splat(0));
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

/* What the backward pass reads for the chunk before this one. */
static struct ahead backward_ahead(const struct scan *s, struct block k, int64_t v, int64_t start) {
  int64_t channel = k.first + v * LANES;
  struct ahead all = {.count = 0};
  add_rows(&all, s->u + k.batch * s->u_b + channel, s->u_l, start - STEPS, STEPS);
  add_rows(&all, s->delta + k.batch * s->delta_b + channel, s->delta_l, start - STEPS, STEPS);
  return all;
}

static void backward_block(const struct scan *s, struct block k, struct room *r, int64_t start, int64_t steps) {
  read_states(s, k, start ? checkpoint_at(s, k, start / STEPS) : s->state ? s->state + place(s, k) : NULL, r->h);
  for (int64_t v = 0; start && v < k.vectors; v++) {
    struct ahead all = backward_ahead(s, k, v, start);
    for (int64_t t = 0; t < STEPS; t++) prefetch(&all, t);
  }
  read_chunk(s, k, r, start, steps);
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
    int plain = 1;
    for (int64_t v = 0; v < k.vectors; v++) plain = plain && is_plain(s, r, n, v);
    count = plain ? TOGETHER : 1;
    memset(r->sums, 0, sizeof r->sums);
    for (int64_t v = 0; v < k.vectors; v++) {
      int64_t lanes = lanes_of(k, v);
      if (!plain) scan_chunk_back(r, n, v, lanes, steps, 1, 0, s->b_unit != 0, s->c_unit != 0, s->z != NULL);
      else if (s->z) scan_chunk_back(r, n, v, lanes, steps, TOGETHER, 1, 1, 1, 1);
      else scan_chunk_back(r, n, v, lanes, steps, TOGETHER, 1, 1, 1, 0);
    }
    for (int64_t t = 0; t < steps; t++)
      for (int64_t j = 0; j < count; j++) {
        int64_t at = ((k.batch * s->length + start + t) * blocks_of(s) + k.index) * s->states + n + j;
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

static void backward_task(const struct scan *s, int64_t batch, int64_t first, int64_t blocks, struct room *r) {
  for (int64_t i = 0; i < blocks; i++) {
    struct block k = block_of(s, batch, first + i);
    turn_to(r, i, s->states);
    enter(s, k, r);
    read_states(s, k, s->dlast ? s->dlast + place(s, k) : NULL, r->g);
    for (int64_t j = 0; j < s->states * VECTORS; j++) r->dA[j] = r->dB[j] = r->dC[j] = splat(0);
    for (int64_t v = 0; v < VECTORS; v++) r->dD[v] = r->dbias[v] = splat(0);
  }
  for (int64_t start = (s->length - 1) / STEPS * STEPS; start >= 0; start -= STEPS) {
    int64_t steps = s->length - start < STEPS ? s->length - start : STEPS;
    enter_chunk(s, batch, r, start, steps);
    for (int64_t i = 0; i < blocks; i++) {
      turn_to(r, i, s->states);
      backward_block(s, block_of(s, batch, first + i), r, start, steps);
    }
  }
  for (int64_t i = 0; i < blocks; i++) {
    struct block k = block_of(s, batch, first + i);
    turn_to(r, i, s->states);
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
}

/* --- threads -----------------------------------------------------------------------------------------------------
   Started for a call and joined before it returns: between calls there is no thread that a forked child would miss. */

typedef void pass(const struct scan *, int64_t batch, int64_t first, int64_t blocks, struct room *);

struct work {
  const struct scan *scan;
  pass *run;
  int64_t tasks, together; /* together: blocks of a task */
  atomic_llong next;
  atomic_int failed;
};

/* How many blocks a task has: as many as keep their tables in the processor's cache, and no more than leave each thread
   two tasks. Eight blocks of float32 are half a page of memory in each row. */
static int64_t blocks_together(const struct scan *s) {
  enum { MOST = 8, CACHE = 1 << 19 };
  int64_t most = CACHE / bytes_of_tables(s->states), blocks = blocks_of(s);
  if (s->threads > 1 && s->batch * blocks / (2 * s->threads) < most) most = s->batch * blocks / (2 * s->threads);
  if (most > MOST) most = MOST;
  if (most > blocks) most = blocks;
  return most > 1 ? most : 1;
}

static void *work_through(void *given) {
  struct work *w = given;
  int64_t blocks = blocks_of(w->scan), each = (blocks + w->together - 1) / w->together;
  struct room *r = make_room(w->scan->states, w->together);
  if (!r) {
    w->failed = 1;
    return NULL;
  }
  for (int64_t i; (i = w->next++) < w->tasks;) {
    int64_t first = i % each * w->together, left = blocks - first;
    w->run(w->scan, i / each, first, left < w->together ? left : w->together, r);
  }
  free(r);
  return NULL;
}

/* 0, or 1 where there is no memory left. */
static int share_out(const struct scan *s, pass *run) {
  enum { MOST = 256 };
  struct work w = {.scan = s, .run = run, .together = blocks_together(s)};
  w.tasks = s->batch * ((blocks_of(s) + w.together - 1) / w.together);
  pthread_t others[MOST];
  int64_t wanted = s->threads < w.tasks ? s->threads : w.tasks, made = 0;
  while (made < wanted - 1 && made < MOST && !pthread_create(&others[made], NULL, work_through, &w)) made++;
  work_through(&w);
  for (int64_t i = 0; i < made; i++) pthread_join(others[i], NULL);
  return w.failed;
}

int forward(const struct scan *s) { return share_out(s, forward_task); }
int backward(const struct scan *s) { return share_out(s, backward_task); }
