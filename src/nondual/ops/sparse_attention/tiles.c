/* Block-sparse attention on a CPU, forward and backward: kept tiles are computed from keys and values where they lie.

   Source: Dao 2023 (2307.08691), Algorithms 1 and 2, over listed tiles. Symbols: B batch, H query heads, G key/value
   heads, N queries, M keys, D and Dv the widths of a key and a value; in the names below dx is the gradient of x.

       forward    s = scale q·k,  p = exp(s - m),  m the greatest s so far,  out = Σ p v / Σ p,  lse = m + log Σ p
       backward   s = scale q·k,  p = exp(s - lse),  ds = p (dout·v - delta),  delta = dout·out - dlse
                  dv += p dout,  dq += scale ds k,  dk += scale ds q

   A band is up to BAND queries of one head in one row of tiles. They lie side by side in vectors: Q is turned once for
   the band, to (D, BAND), and the scores of up to KEYS keys are K Qᵀ, (keys, BAND). So keys and values are read as they
   are, never copied, and maximum and sum over keys need no step across a vector. Every product of matrices is
   `multiply`.

   Scores are in base 2, exp(s) = 2^(s log2 e): the factor scale · log2 e is part of the turned Q.

   A thread takes neighbouring bands of a head forward, and a whole key/value head backward, whose bands add to the same
   dk and dv. Each number is summed in the same order whatever the number of threads.

   Compiled by ops/c_loop.py with BAND, which is 64, and KEYS defined, and DOUBLE for float64;
   compiled.py fills `struct tiles`. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* ROWS x VECTORS sums of a product are kept in registers, of which there are 32 where VECTORS is 4, elsewhere 16. */
#if defined(__AVX512F__)
enum { BYTES = 64 };
#define VECTORS 4
#elif defined(__AVX__)
enum { BYTES = 32 };
#define VECTORS 2
#elif defined(__aarch64__)
enum { BYTES = 16 };
#define VECTORS 4
#else
enum { BYTES = 16 };
#define VECTORS 2
#endif

#ifdef DOUBLE
typedef double real;
typedef int64_t bits;
enum { MANTISSA = 52, BIAS = 1023 };
static const real LOWEST = -1.7976931348623157e308;
#else
typedef float real;
typedef int32_t bits;
enum { MANTISSA = 23, BIAS = 127 };
static const real LOWEST = -3.4028234663852886e38f;
#endif

static const double LOG2_E = 1.4426950408889634, LOG_2 = 0.6931471805599453;

enum { ROWS = 6, LANES = BYTES / sizeof(real) };
typedef real vec __attribute__((vector_size(BYTES)));
typedef bits ivec __attribute__((vector_size(BYTES)));
typedef real loose __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias)); /* as it lies in a tensor */
#define INLINE static inline __attribute__((always_inline))

struct tensor { /* (B, heads, rows, width): strides count numbers, and the last axis is dense */
  real *at;
  int64_t b, h, n;
};

struct tiles { /* eight bytes each */
  int64_t batch, heads, groups, n, m;
  int64_t width, width_v;         /* of the rows of q, k, dk and of v, dout, dv: multiples of LANES, filled up with 0 */
  int64_t given, given_v;         /* of the rows of dq and out */
  int64_t block_q, block_kv, bm, gm, rows; /* rows of tiles; bm and gm: how many lists, 1 where all share them */
  int64_t mask_row;               /* words in a row of `masks` */
  int64_t threads;
  double scale;
  const int32_t *row_start, *columns, *kinds;
  const uint64_t *masks;          /* (U, block_kv, mask_row), a bit for each of BAND queries: 1 where it is allowed */
  struct tensor q, k, v, out, lse;    /* out and lse are written forward and read backward */
  struct tensor dout, dlse, dq, dk, dv; /* of the backward pass; dlse may be null, dk and dv are added to */
};

/* --- vectors ------------------------------------------------------------------------------------------------------ */

INLINE vec splat(real x) { return x - (vec){0}; }
INLINE vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
INLINE vec load(const real *from) { return (vec)*(const loose *)from; }
INLINE void store(real *to, vec x) { *(loose *)to = x; }

/* 2^x for x up to BIAS: the whole part goes into the exponent, the rest is the polynomial of least relative error
   (2e-9; 3e-18 in float64). 0 where 2^x is below the smallest normal number. NaN for NaN: the last step multiplies. */
INLINE vec power_of_2(vec x) {
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
  const real magic = 1.5 * ((bits)1 << MANTISSA), least = -BIAS; /* adding magic rounds to whole numbers */
  x = choose(x < least, splat(least), x);
  vec shifted = x + magic, f = x - (shifted - magic), p = splat(c[DEGREE]);
#pragma GCC unroll 16
  for (int i = DEGREE - 1; i >= 0; i--) p = p * f + c[i];
  return p * (vec)(((ivec)shifted + BIAS) << MANTISSA);
}

/* --- products of matrices ----------------------------------------------------------------------------------------- */

/* c (rows, vectors) = a (rows, depth) b (depth, vectors), added to what c holds where `add`. a has any strides; rows
   of b and c are dense. The first three arguments are constants wherever it is inlined. */
INLINE void product(int rows, int vectors, int add, int64_t depth, const real *a, int64_t a_row, int64_t a_depth,
                    const real *b, int64_t b_depth, real *c, int64_t c_row) {
  vec sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) sum[r][v] = add ? load(c + r * c_row + v * LANES) : splat(0);
  for (int64_t k = 0; k < depth; k++) {
    vec of_b[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) of_b[v] = load(b + k * b_depth + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      vec of_a = splat(a[r * a_row + k * a_depth]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) sum[r][v] += of_a * of_b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) store(c + r * c_row + v * LANES, sum[r][v]);
}

typedef void sized(int64_t, const real *, int64_t, int64_t, const real *, int64_t, real *, int64_t);

#define SIZED(name, rows, vectors, add)                                                                        \
  static __attribute__((noinline)) void name(int64_t depth, const real *a, int64_t a_row, int64_t a_depth,     \
                                             const real *b, int64_t b_depth, real *c, int64_t c_row) {         \
    product(rows, vectors, add, depth, a, a_row, a_depth, b, b_depth, c, c_row);                               \
  }
#define BOTH(rows, vectors) SIZED(set_##rows##_##vectors, rows, vectors, 0) \
                            SIZED(add_##rows##_##vectors, rows, vectors, 1)
#define EACH(vectors) BOTH(1, vectors) BOTH(2, vectors) BOTH(3, vectors) \
                      BOTH(4, vectors) BOTH(5, vectors) BOTH(6, vectors)
#define NAMES(kind, vectors) {kind##_1_##vectors, kind##_2_##vectors, kind##_3_##vectors, \
                              kind##_4_##vectors, kind##_5_##vectors, kind##_6_##vectors}

EACH(1)
EACH(2)
#if VECTORS == 4
EACH(3)
EACH(4)
#define TABLE(kind) {NAMES(kind, 1), NAMES(kind, 2), NAMES(kind, 3), NAMES(kind, 4)}
#else
#define TABLE(kind) {NAMES(kind, 1), NAMES(kind, 2)}
#endif
static sized *const products[2][VECTORS][ROWS] = {TABLE(set), TABLE(add)};

/* The same for any number of rows and vectors. */
static void multiply(int add, int64_t rows, int64_t vectors, int64_t depth, const real *a, int64_t a_row,
                     int64_t a_depth, const real *b, int64_t b_depth, real *c, int64_t c_row) {
  for (int64_t v = 0; v < vectors; v += VECTORS) {
    int64_t wide = vectors - v < VECTORS ? vectors - v : VECTORS;
    for (int64_t r = 0; r < rows; r += ROWS) {
      int64_t high = rows - r < ROWS ? rows - r : ROWS;
      sized *run = products[add][wide - 1][high - 1];
      run(depth, a + r * a_row, a_row, a_depth, b + v * LANES, b_depth, c + r * c_row + v * LANES, c_row);
    }
  }
}

/* --- bands -------------------------------------------------------------------------------------------------------- */

struct band {
  int64_t b, h, g;        /* of which sequence, query head and key/value head */
  int64_t first, count;   /* its queries */
  int64_t within;         /* the first of them, counted in its row of tiles */
  int64_t across;         /* vectors that hold its queries; lanes beyond the last query hold 0 and are dropped */
  int64_t list, list_end; /* its tiles are these entries of `columns` and `kinds` */
};

/* What a thread works in. */
struct room {
  real s[KEYS * BAND], ds[KEYS * BAND]; /* scores, then weights, and the gradients of scores */
  real most[BAND];                      /* of each query: the greatest score so far; backward, its lse in base 2 */
  real sum[BAND];                       /* Σ p so far; backward, delta */
  real *q, *dout;                       /* turned: (D, BAND) and (Dv, BAND) */
  real *out;                            /* (BAND, Dv); backward (BAND, D), dq */
};

static struct room *make_room(const struct tiles *t) {
  size_t head = (sizeof(struct room) + 63) / 64 * 64, widest = t->width > t->width_v ? t->width : t->width_v;
  size_t part = (widest * BAND * sizeof(real) + 63) / 64 * 64;
  char *memory = aligned_alloc(64, head + 3 * part);
  if (!memory) return NULL;
  struct room *r = (struct room *)memory;
  r->q = (real *)(memory + head), r->dout = (real *)(memory + head + part), r->out = (real *)(memory + head + 2 * part);
  return r;
}

static int64_t bands_of_row(const struct tiles *t) { return (t->block_q + BAND - 1) / BAND; }
static int64_t bands_of_head(const struct tiles *t) { return t->rows * bands_of_row(t); }

/* Band i of a head. Its count is 0 where N cuts it away. */
static struct band band_of(const struct tiles *t, int64_t b, int64_t h, int64_t i) {
  int64_t each = bands_of_row(t), row = i / each, stop = (row + 1) * t->block_q;
  if (stop > t->n) stop = t->n;
  struct band k = {.b = b, .h = h, .g = h / (t->heads / t->groups), .within = i % each * BAND};
  k.first = row * t->block_q + k.within;
  k.count = stop - k.first < BAND ? stop - k.first : BAND;
  if (k.count < 0) k.count = 0;
  k.across = (k.count + LANES - 1) / LANES;
  int64_t lists = (t->bm == 1 ? 0 : b) * t->gm + (t->gm == 1 ? 0 : k.g);
  const int32_t *start = t->row_start + lists * (t->rows + 1) + row;
  k.list = start[0], k.list_end = start[1];
  return k;
}

INLINE real *row_of(const struct tensor *x, int64_t b, int64_t h, int64_t n) {
  return x->at + b * x->b + h * x->h + n * x->n;
}

/* The rows of a band, multiplied by a factor, as (width, BAND). */
static void turn(const struct tensor *x, const struct band *k, int64_t width, double factor, real *to) {
  const real *from = row_of(x, k->b, k->h, k->first);
  for (int64_t d = 0; d < width; d++) {
    for (int64_t i = 0; i < k->count; i++) to[d * BAND + i] = from[i * x->n + d] * factor;
    for (int64_t i = k->count; i < k->across * LANES; i++) to[d * BAND + i] = 0;
  }
}

/* Up to KEYS keys of a tile, one after another: `stretch` is at none before the first call. */
struct stretch { int64_t entry, key, keys, in_tile; };

static int next_stretch(const struct tiles *t, const struct band *k, struct stretch *at) {
  int64_t start, stop;
  for (;; at->entry++, at->in_tile = -1) {
    if (at->entry == k->list_end) return 0;
    at->in_tile = at->in_tile < 0 ? 0 : at->in_tile + KEYS;
    start = t->columns[at->entry] * (int64_t)t->block_kv, stop = start + t->block_kv;
    if (stop > t->m) stop = t->m;
    if (start + at->in_tile < stop) break;
  }
  at->key = start + at->in_tile;
  at->keys = stop - at->key < KEYS ? stop - at->key : KEYS;
  return 1;
}

/* The scores of these keys, (keys, BAND), -inf where the tile's mask forbids them. */
static void scores(const struct tiles *t, const struct band *k, const struct stretch *at, struct room *r) {
  multiply(0, at->keys, k->across, t->width, row_of(&t->k, k->b, k->g, at->key), t->k.n, 1, r->q, BAND, r->s, BAND);
  int64_t kind = t->kinds[at->entry];
  if (kind < 0) return;
  const uint64_t *mask = t->masks + (kind * t->block_kv + at->in_tile) * t->mask_row + k->within / BAND;
  ivec lane;
  for (int i = 0; i < LANES; i++) lane[i] = (bits)1 << i;
  for (int64_t j = 0; j < at->keys; j++)
    for (int64_t a = 0; a < k->across; a++) {
      ivec allowed = ((bits)(mask[j * t->mask_row] >> a * LANES) & lane) != 0;
      real *s = r->s + j * BAND + a * LANES;
      store(s, choose(allowed, load(s), splat(-INFINITY)));
    }
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

/* Turns scores to weights p and adds these up, beside the greatest score so far. One that grows by no more than `slack`
   is left as it was, since a p of 2^slack overflows nothing: so what has been summed seldom has to be rescaled. */
static void weigh(const struct tiles *t, const struct band *k, int64_t keys, struct room *r) {
  const real slack = 8;
  for (int64_t a = 0; a < k->across; a++) {
    real *s = r->s + a * LANES;
    vec was = load(r->most + a * LANES), most = was, sum = load(r->sum + a * LANES);
    for (int64_t j = 0; j < keys; j++) {
      vec x = load(s + j * BAND);
      most = choose(x > most, x, most);
    }
    ivec grown = most > was + slack;
    bits any = 0;
    for (int i = 0; i < LANES; i++) any |= grown[i];
    if (any) {
      vec factor = power_of_2(was - most);
      sum *= factor;
      store(r->most + a * LANES, most);
      for (int64_t i = 0; i < LANES && a * LANES + i < k->count; i++)
        for (int64_t d = 0; d < t->width_v; d++) r->out[(a * LANES + i) * t->width_v + d] *= factor[i];
    } else {
      most = was;
    }
    for (int64_t j = 0; j < keys; j++) {
      vec p = power_of_2(load(s + j * BAND) - most);
      sum += p;
      store(s + j * BAND, p);
    }
    store(r->sum + a * LANES, sum);
  }
}

static void forward_band(const struct tiles *t, struct band k, struct room *r) {
  turn(&t->q, &k, t->width, t->scale * LOG2_E, r->q);
  memset(r->out, 0, k.count * t->width_v * sizeof(real));
  for (int64_t i = 0; i < BAND; i++) r->most[i] = LOWEST, r->sum[i] = 0;
  for (struct stretch at = {.entry = k.list, .in_tile = -1}; next_stretch(t, &k, &at);) {
    scores(t, &k, &at, r);
    weigh(t, &k, at.keys, r);
    multiply(1, k.count, t->width_v / LANES, at.keys, r->s, 1, BAND, row_of(&t->v, k.b, k.g, at.key), t->v.n, r->out,
             t->width_v);
  }
  for (int64_t i = 0; i < k.count; i++) { /* a query that may attend to nothing: 0 and -inf */
    real sum = r->sum[i], share = sum == 0 ? 0 : 1 / sum, *to = row_of(&t->out, k.b, k.h, k.first + i);
    for (int64_t d = 0; d < t->given_v; d++) to[d] = r->out[i * t->width_v + d] * share;
    *row_of(&t->lse, k.b, k.h, k.first + i) = sum == 0 ? -INFINITY : (real)(r->most[i] * LOG_2 + log(sum));
  }
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

/* lse in base 2, and delta, of each query of a band. */
static void enter(const struct tiles *t, const struct band *k, struct room *r) {
  for (int64_t i = 0; i < BAND; i++) r->most[i] = r->sum[i] = 0;
  for (int64_t i = 0; i < k->count; i++) {
    const real *out = row_of(&t->out, k->b, k->h, k->first + i), *dout = row_of(&t->dout, k->b, k->h, k->first + i);
    real lse = *row_of(&t->lse, k->b, k->h, k->first + i), delta = 0;
    vec sums = {0};
    int64_t d = 0;
    for (; d + LANES <= t->given_v; d += LANES) sums += load(out + d) * load(dout + d);
    for (int j = 0; j < LANES; j++) delta += sums[j];
    for (; d < t->given_v; d++) delta += out[d] * dout[d];
    if (t->dlse.at) delta -= *row_of(&t->dlse, k->b, k->h, k->first + i);
    r->sum[i] = delta;
    r->most[i] = lse == -INFINITY ? 0 : lse * LOG2_E; /* where all is forbidden every s is -inf, and p = 0 */
  }
}

/* Scores to weights p, and dout·v to scale · ds. */
static void differentiate(const struct tiles *t, const struct band *k, int64_t keys, struct room *r) {
  const real scale = t->scale;
  for (int64_t a = 0; a < k->across; a++) {
    vec lse = load(r->most + a * LANES), delta = load(r->sum + a * LANES);
    for (int64_t j = 0; j < keys; j++) {
      real *s = r->s + j * BAND + a * LANES, *ds = r->ds + j * BAND + a * LANES;
      vec p = power_of_2(load(s) - lse);
      store(s, p);
      store(ds, p * (load(ds) - delta) * scale);
    }
  }
}

static void backward_band(const struct tiles *t, struct band k, struct room *r) {
  const real *q = row_of(&t->q, k.b, k.h, k.first), *dout = row_of(&t->dout, k.b, k.h, k.first);
  turn(&t->q, &k, t->width, t->scale * LOG2_E, r->q);
  turn(&t->dout, &k, t->width_v, 1, r->dout);
  enter(t, &k, r);
  memset(r->out, 0, k.count * t->width * sizeof(real));
  for (struct stretch at = {.entry = k.list, .in_tile = -1}; next_stretch(t, &k, &at);) {
    const real *keys = row_of(&t->k, k.b, k.g, at.key), *values = row_of(&t->v, k.b, k.g, at.key);
    real *dk = row_of(&t->dk, k.b, k.g, at.key), *dv = row_of(&t->dv, k.b, k.g, at.key);
    scores(t, &k, &at, r);
    multiply(0, at.keys, k.across, t->width_v, values, t->v.n, 1, r->dout, BAND, r->ds, BAND);
    differentiate(t, &k, at.keys, r);
    multiply(1, at.keys, t->width_v / LANES, k.count, r->s, BAND, 1, dout, t->dout.n, dv, t->dv.n);
    multiply(1, at.keys, t->width / LANES, k.count, r->ds, BAND, 1, q, t->q.n, dk, t->dk.n);
    multiply(1, k.count, t->width / LANES, at.keys, r->ds, 1, BAND, keys, t->k.n, r->out, t->width);
  }
  for (int64_t i = 0; i < k.count; i++)
    memcpy(row_of(&t->dq, k.b, k.h, k.first + i), r->out + i * t->width, t->given * sizeof(real));
}

/* --- threads ------------------------------------------------------------------------------------------------------
   Started for a call and joined before it returns: between calls there is no thread that a forked child would miss. */

enum { TOGETHER = 8 }; /* bands of a task */

static int64_t tasks_of_head(const struct tiles *t) { return (bands_of_head(t) + TOGETHER - 1) / TOGETHER; }

static void forward_task(const struct tiles *t, int64_t task, struct room *r) {
  int64_t head = task / tasks_of_head(t), first = task % tasks_of_head(t) * TOGETHER, bands = bands_of_head(t);
  for (int64_t i = first; i < first + TOGETHER && i < bands; i++) {
    struct band k = band_of(t, head / t->heads, head % t->heads, i);
    if (k.count) forward_band(t, k, r);
  }
}

static void backward_task(const struct tiles *t, int64_t task, struct room *r) {
  int64_t share = t->heads / t->groups, b = task / t->groups, g = task % t->groups;
  for (int64_t i = 0; i < bands_of_head(t); i++)
    for (int64_t h = g * share; h < (g + 1) * share; h++) {
      struct band k = band_of(t, b, h, i);
      if (k.count) backward_band(t, k, r);
    }
}

typedef void pass(const struct tiles *, int64_t task, struct room *);

struct work {
  const struct tiles *tiles;
  pass *run;
  int64_t tasks;
  atomic_llong next;
  atomic_int failed;
};

static void *work_through(void *given) {
  struct work *w = given;
  struct room *r = make_room(w->tiles);
  if (!r) {
    w->failed = 1;
    return NULL;
  }
  for (int64_t task; (task = w->next++) < w->tasks;) w->run(w->tiles, task, r);
  free(r);
  return NULL;
}

/* 0, or 1 where there is no memory left. */
static int share_out(const struct tiles *t, pass *run, int64_t tasks) {
  enum { MOST = 256 };
  struct work w = {.tiles = t, .run = run, .tasks = tasks};
  pthread_t others[MOST];
  int64_t wanted = t->threads < tasks ? t->threads : tasks, made = 0;
  while (made < wanted - 1 && made < MOST && !pthread_create(&others[made], NULL, work_through, &w)) made++;
  work_through(&w);
  for (int64_t i = 0; i < made; i++) pthread_join(others[i], NULL);
  return w.failed;
}

int forward(const struct tiles *t) { return share_out(t, forward_task, t->batch * t->heads * tasks_of_head(t)); }
int backward(const struct tiles *t) { return share_out(t, backward_task, t->batch * t->groups); }
