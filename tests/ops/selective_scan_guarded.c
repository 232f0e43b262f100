/* Both passes of scan.c in many sizes and layouts, with every tensor ending exactly at a page that may not be touched.

   Made to be compiled with -fsanitize=address,undefined, which watches what the pages cannot: the scratch memory, the
   stack, the arithmetic of integers. test_selective_scan_sanitized.py compiles and runs it.

   -DSOURCE="…/scan.c" and scan.c's own -DSTEPS, -DWIDTH, -DDOUBLE. Prints the number of cases, and returns 0 if nothing was
   touched that should not be and every number of every result was written. */

#define _GNU_SOURCE
#include SOURCE

#include <math.h>
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

static real next_number(void) { /* between -1 and 1 */
  static uint64_t x = 1;
  x = x * 6364136223846793005u + 1442695040888963407u;
  return (int32_t)(x >> 32) * (real)4.656612873077393e-10;
}

static real *drawn(int64_t count) {
  real *x = guarded(count * sizeof(real));
  for (int64_t i = 0; i < count; i++) x[i] = next_number();
  return x;
}

static struct { real *at; int64_t count; const char *name; } results[16];
static int made;

static real *result(const char *name, int64_t count) {
  real *x = guarded(count * sizeof(real));
  for (int64_t i = 0; i < count; i++) x[i] = NAN;
  results[made].at = x, results[made].count = count, results[made++].name = name;
  return x;
}

static int all_written(void) {
  int good = 1;
  while (made) {
    made--;
    for (int64_t i = 0; i < results[made].count; i++)
      if (isnan(results[made].at[i])) {
        printf("%s was not written at %lld\n", results[made].name, (long long)i);
        good = 0;
        break;
      }
  }
  return good;
}

/* (B, L, width) with rows `extra` numbers apart; the last row ends at the protected page. */
static real *rows(struct scan *s, int64_t width, int64_t extra, int64_t *batch_stride, int64_t *row_stride) {
  *row_stride = width + extra, *batch_stride = s->length * *row_stride;
  return drawn(s->batch * *batch_stride - extra);
}

static int one_case(int64_t length, int64_t d, int64_t n, int64_t groups, int bare, int64_t extra, int64_t threads) {
  struct scan s = {.batch = 2, .length = length, .channels = d, .states = n, .threads = threads, .softplus = !bare};
  int64_t g = groups ? groups : 1, per_state = s.batch * d * n, between = (length - 1) / STEPS;
  s.unit = d / g;
  s.u = rows(&s, d, extra, &s.u_b, &s.u_l);
  s.delta = rows(&s, d, 0, &s.delta_b, &s.delta_l);
  s.dy = rows(&s, d, 2 * extra, &s.dy_b, &s.dy_l);
  s.A = drawn(d * n);
  if (groups) {
    s.B = rows(&s, g * n, extra, &s.b_b, &s.b_l), s.b_g = n, s.b_unit = d / g;
    s.C = rows(&s, g * n, 0, &s.c_b, &s.c_l), s.c_g = n, s.c_unit = d / g;
  } else {
    s.B = drawn(d * n), s.C = drawn(d * n);
  }
  int64_t blocks = blocks_of(&s), timed = s.batch * length * blocks * n;
  s.y = result("y", s.batch * length * d);
  s.last = result("last", per_state);
  s.checkpoints = result("checkpoints", between * per_state);
  s.du = result("du", s.batch * length * d);
  s.ddelta = result("ddelta", s.batch * length * d);
  s.dA = result("dA", per_state);
  s.dB = result("dB", groups ? timed : per_state);
  s.dC = result("dC", groups ? timed : per_state);
  if (!bare) {
    s.D = drawn(d), s.bias = drawn(d), s.state = drawn(per_state), s.dlast = drawn(per_state);
    s.z = rows(&s, d, 3 * extra, &s.z_b, &s.z_l);
    uint8_t *reset = guarded(s.batch * length);
    for (int64_t i = 0; i < s.batch * length; i++) reset[i] = next_number() > (real)0.8;
    s.reset = reset;
    s.dz = result("dz", s.batch * length * d);
    s.dstate = result("dstate", per_state);
    s.dD = result("dD", s.batch * d);
    s.dbias = result("dbias", s.batch * d);
  }
  int failed = forward(&s) || backward(&s), good = all_written() && !failed;
  unmap();
  if (!good) printf("length %lld, channels %lld, states %lld\n", (long long)length, (long long)d, (long long)n);
  return good;
}

int main(void) {
  static const int64_t widths[] = {1, 7, 17, 33, 67}, lengths[] = {1, STEPS, STEPS + 3};
  int cases = 0, good = 1;
  for (int w = 0; w < 5; w++)
    for (int64_t n = 1; n <= 17; n++)
      for (int l = 0; l < 3; l++)
        for (int kind = 0; kind < 4 && good; kind++, cases++) {
          int64_t groups = kind == 0 ? 0 : kind == 1 ? 1 : widths[w]; /* (D, N), one for all, one for each */
          good = one_case(lengths[l], widths[w], n, groups, kind == 3, kind == 2 ? 5 : 0, kind == 1 ? 3 : 1);
        }
  good = good && one_case(2 * STEPS + 1, 10 * WIDTH + 1, 5, 1, 0, 1, 1); /* more blocks than one task holds */
  printf("%d cases\n", cases + 1);
  return !good;
}
