/* Both passes of tiles.c in many sizes and layouts, with every tensor ending exactly at a page that may not be touched.

   Made to be compiled with -fsanitize=address,undefined, which watches what the pages cannot: the scratch memory, the
   stack, the arithmetic of integers. test_sparse_attention_sanitized.py compiles and runs it.

   -DSOURCE="…/tiles.c" and tiles.c's own -DBAND, -DKEYS, -DDOUBLE. Prints the number of cases, and returns 0 if nothing
   was touched that should not be and every number of every result was written. */

#define _GNU_SOURCE
#include SOURCE

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

static struct { void *at; size_t size; } mapped[64];
static int maps;

/* Memory for `size` bytes that ends at a protected page. */
static void *guarded(size_t size) {
  size_t page = sysconf(_SC_PAGESIZE), whole = (size + page - 1) / page * page;
  char *at = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED || mprotect(at + whole, page, PROT_NONE)) abort();
  mapped[maps].at = at, mapped[maps++].size = whole + page;
  return at + whole - size;
}

static void unmap(void) {
  while (maps) maps--, munmap(mapped[maps].at, mapped[maps].size);
}

static uint32_t next_bits(void) {
  static uint64_t x = 1;
  x = x * 6364136223846793005u + 1442695040888963407u;
  return x >> 32;
}

/* (B, heads, rows, width), rows `extra` numbers apart: all 0 or all NaN, as `fill` is, else drawn between -1 and 1. */
static struct tensor tensor(int64_t batch, int64_t heads, int64_t rows, int64_t width, int64_t extra, real fill) {
  struct tensor x = {.n = width + extra};
  x.h = rows * x.n, x.b = heads * x.h;
  int64_t count = batch * x.b - extra;
  x.at = guarded(count * sizeof(real));
  for (int64_t i = 0; i < count; i++)
    x.at[i] = isnan(fill) || fill == 0 ? fill : (int32_t)next_bits() / (real)2147483648;
  return x;
}

static int all_numbers(const char *name, struct tensor x, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t n = 0; n < rows; n++)
        for (int64_t d = 0; d < width; d++)
          if (isnan(*(row_of(&x, b, h, n) + d))) {
            printf("%s was not written at %lld %lld\n", name, (long long)n, (long long)d);
            return 0;
          }
  return 1;
}

/* Each tile is kept or not, whole or of one of three masks, as it is drawn. */
static void draw_lists(struct tiles *t) {
  int64_t lists = t->bm * t->gm, columns = (t->m + t->block_kv - 1) / t->block_kv, kept = 0;
  int64_t most = lists * t->rows * columns;
  int32_t *listed = malloc(most * sizeof *listed), *kinds = malloc(most * sizeof *kinds);
  int32_t *start = guarded(lists * (t->rows + 1) * sizeof *start);
  for (int64_t l = 0; l < lists; l++) {
    *start++ = kept;
    for (int64_t i = 0; i < t->rows; i++, *start++ = kept)
      for (int64_t j = 0; j < columns; j++)
        if (next_bits() % 2) listed[kept] = j, kinds[kept++] = (int32_t)(next_bits() % 4) - 1;
  }
  t->row_start = start - lists * (t->rows + 1);
  t->columns = memcpy(guarded(kept * sizeof *listed), listed, kept * sizeof *listed);
  t->kinds = memcpy(guarded(kept * sizeof *kinds), kinds, kept * sizeof *kinds);
  free(listed), free(kinds);
  t->mask_row = (t->block_q + BAND - 1) / BAND;
  uint64_t *masks = guarded(3 * t->block_kv * t->mask_row * sizeof *masks);
  for (int64_t i = 0; i < 3 * t->block_kv * t->mask_row; i++) masks[i] = next_bits() * (uint64_t)next_bits();
  t->masks = masks;
}

static int one_case(int64_t n, int64_t m, int64_t block_q, int64_t block_kv, int64_t widths, int64_t kind) {
  struct tiles t = {.batch = 2, .heads = 4, .groups = kind ? 2 : 4, .n = n, .m = m, .block_q = block_q,
                    .block_kv = block_kv, .bm = kind == 1 ? 2 : 1, .gm = kind == 2 ? 2 : 1,
                    .threads = kind == 1 ? 3 : 1, .scale = 0.5};
  t.width = widths * LANES, t.given = t.width - widths % 2;
  t.width_v = (widths % 3 + 1) * LANES, t.given_v = t.width_v - kind % 2;
  t.rows = (n + block_q - 1) / block_q;
  draw_lists(&t);
  int64_t extra = kind == 2 ? 5 : 0;
  t.q = tensor(2, 4, n, t.width, extra, 1);
  t.k = tensor(2, t.groups, m, t.width, extra, 1);
  t.v = tensor(2, t.groups, m, t.width_v, 0, 1);
  t.out = tensor(2, 4, n, t.given_v, extra, NAN);
  t.lse = tensor(2, 4, n, 1, 0, NAN);
  t.dout = tensor(2, 4, n, t.width_v, extra, 1);
  if (kind) t.dlse = tensor(2, 4, n, 1, 0, 1);
  t.dq = tensor(2, 4, n, t.given, 0, NAN);
  t.dk = tensor(2, t.groups, m, t.width, 0, 0);
  t.dv = tensor(2, t.groups, m, t.width_v, 0, 0);
  int good = !forward(&t) && all_numbers("out", t.out, 2, 4, n, t.given_v) && all_numbers("lse", t.lse, 2, 4, n, 1);
  good = good && !backward(&t) && all_numbers("dq", t.dq, 2, 4, n, t.given);
  good = good && all_numbers("dk", t.dk, 2, t.groups, m, t.width) && all_numbers("dv", t.dv, 2, t.groups, m, t.width_v);
  unmap();
  if (!good)
    printf("N %lld, M %lld, tiles of %lld x %lld\n", (long long)n, (long long)m, (long long)block_q,
           (long long)block_kv);
  return good;
}

int main(void) {
  static const int64_t lengths[] = {1, 67, 131}, blocks[] = {1, 16, 64, 130};
  int cases = 0, good = 1;
  for (int n = 0; n < 3; n++)
    for (int m = 0; m < 3; m++)
      for (int b = 0; b < 4; b++)
        for (int kind = 0; kind < 3 && good; kind++, cases++)
          good = one_case(lengths[n], lengths[m], blocks[b], blocks[(b + kind) % 4], 1 + (n + m + b) % 6, kind);
  printf("%d cases\n", cases);
  return !good;
}
