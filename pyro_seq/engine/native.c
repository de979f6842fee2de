/* What the eager loop spends most of its time on with very many particles, in one pass over memory each: normal numbers, the
 * same as torch's bit for bit, and the log density of a normal distribution. `native.py` says what for, and calls it.
 *
 * Sources: Matsumoto and Nishimura, Mersenne Twister, 1998; Box and Muller, A note on the generation of random normal deviates,
 * 1958; Moshier, Cephes mathematical library, 1992, for the polynomials of log, sin and cos in single precision.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum {
  WIDTH = 16, /* numbers at a time; where registers are narrower, the compiler takes several */
  CHUNK = 128 * WIDTH /* what stays in the first cache */
};

typedef float Reals __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

#if defined(__x86_64__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define FOR_EACH_PROCESSOR __attribute__((flatten))
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE Reals choose(Ints which, Reals yes, Reals no) { return (Reals)(((Ints)yes & which) | ((Ints)no & ~which)); }

INLINE Reals all(float x) { return (Reals){} + x; }

/* Of positive, finite and normal numbers. */
INLINE Reals logarithm(Reals x) {
  Reals exponent = __builtin_convertvector(((Ints)x >> 23) - 126, Reals);
  x = (Reals)(((Ints)x & 0x007fffff) | 0x3f000000); /* in [1/2, 1) */
  Ints low = ((Ints)x - 0x3f3504f3) >> 31; /* below the root of 1/2 */
  Reals once = (Reals)((Ints)x & low);
  x = x - 1.0f;
  exponent = exponent - (Reals)((Ints)all(1.0f) & low);
  x = x + once;
  Reals square = x * x;
  Reals y = 7.0376836292E-2f * x - 1.1514610310E-1f;
  y = y * x + 1.1676998740E-1f;
  y = y * x - 1.2420140846E-1f;
  y = y * x + 1.4249322787E-1f;
  y = y * x - 1.6668057665E-1f;
  y = y * x + 2.0000714765E-1f;
  y = y * x - 2.4999993993E-1f;
  y = y * x + 3.3333331174E-1f;
  y = y * x * square;
  y = y + exponent * -2.12194440e-4f;
  y = y - square * 0.5f;
  x = x + y;
  return x + exponent * 0.693359375f;
}

INLINE void sine_and_cosine(Reals x, Reals* sine, Reals* cosine) { /* of x >= 0 */
  Ints octant = (__builtin_convertvector(x * 1.27323954473516f, Ints) + 1) & ~1;
  Reals y = __builtin_convertvector(octant, Reals);
  x = x + y * -0.78515625f;
  x = x + y * -2.4187564849853515625e-4f;
  x = x + y * -3.77489497744594108e-8f;
  Reals square = x * x;
  Reals even = 2.443315711809948E-5f * square - 1.388731625493765E-3f;
  even = even * square + 4.166664568298827E-2f;
  even = even * square * square;
  even = even - square * 0.5f;
  even = even + 1.0f;
  Reals odd = -1.9515295891E-4f * square + 8.3321608736E-3f;
  odd = odd * square - 1.6666654611E-1f;
  odd = odd * square * x;
  odd = odd + x;
  Ints as_is = ((octant & 2) >> 1) - 1;
  *sine = (Reals)((Ints)choose(as_is, odd, even) ^ ((octant & 4) << 29));
  *cosine = (Reals)((Ints)choose(as_is, even, odd) ^ ((~(octant - 2) & 4) << 29));
}

INLINE Reals square_root(Reals x) {
  for (int i = 0; i < WIDTH; ++i) x[i] = sqrtf(x[i]);
  return x;
}

/* Torch makes a normal number of each of 16 uniform ones, the first 8 with the last 8. */
INLINE void box_muller(float* first, float* second) {
  Reals a = *(Reals*)first, b = *(Reals*)second, sine, cosine;
  Reals u = 1.0f - __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  Reals v = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  Reals radius = square_root(-2.0f * logarithm(u));
  sine_and_cosine(6.2831853071795864769f * v, &sine, &cosine);
  a = radius * cosine;
  b = radius * sine;
  *(Reals*)first = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  *(Reals*)second = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

enum { WORDS = 624, AHEAD = 397 };

typedef struct {
  uint32_t word[WORDS];
  int64_t next; /* the first one that has not been used */
} Twister;

INLINE uint32_t twisted(uint32_t from, uint32_t and) {
  return (((from & 0x80000000u) | (and & 0x7fffffffu)) >> 1) ^ ((0u - (and & 1u)) & 0x9908b0dfu);
}

INLINE void turn(Twister* twister) {
  uint32_t* word = twister->word;
  for (int i = 0; i < WORDS - AHEAD; ++i) word[i] = word[i + AHEAD] ^ twisted(word[i], word[i + 1]);
  for (int i = WORDS - AHEAD; i < WORDS - 1; ++i) word[i] = word[i + AHEAD - WORDS] ^ twisted(word[i], word[i + 1]);
  word[WORDS - 1] = word[AHEAD - 1] ^ twisted(word[WORDS - 1], word[0]);
  twister->next = 0;
}

/* Uniform numbers in [0, 1). */
INLINE void uniform(Twister* twister, float* out, int64_t n) {
  while (n > 0) {
    if (twister->next == WORDS) turn(twister);
    int64_t some = WORDS - twister->next < n ? WORDS - twister->next : n;
    const uint32_t* word = twister->word + twister->next;
    for (int64_t i = 0; i < some; ++i) {
      uint32_t y = word[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680u;
      y ^= (y << 15) & 0xefc60000u;
      y ^= y >> 18;
      out[i] = (float)(int32_t)(y & 0xffffffu) * 0x1p-24f;
    }
    twister->next += some;
    out += some;
    n -= some;
  }
}

/* The state as torch gives it: seed, steps left and whether seeded (32 bits each), place, then 64 bits a word. */
INLINE void read_state(Twister* twister, const uint8_t* state) {
  int32_t left;
  uint64_t next, words[WORDS];
  memcpy(&left, state + 8, sizeof left);
  memcpy(&next, state + 16, sizeof next);
  memcpy(words, state + 24, sizeof words);
  for (int i = 0; i < WORDS; ++i) twister->word[i] = (uint32_t)words[i];
  twister->next = left == 1 ? WORDS : (int64_t)next;
}

INLINE void write_state(const Twister* twister, uint8_t* state) {
  int32_t left = (int32_t)(WORDS + 1 - twister->next);
  uint64_t next = (uint64_t)twister->next, words[WORDS];
  for (int i = 0; i < WORDS; ++i) words[i] = twister->word[i];
  memcpy(state + 8, &left, sizeof left);
  memcpy(state + 16, &next, sizeof next);
  memcpy(state + 24, words, sizeof words);
}

/* What torch.Tensor.normal_ would write, for n >= 16; the state of its generator goes on alike. */
FOR_EACH_PROCESSOR
void standard_normal(uint8_t* state, float* out, int64_t n) {
  Twister twister;
  read_state(&twister, state);
  for (int64_t from = 0; from < n; from += CHUNK) {
    int64_t some = n - from < CHUNK ? n - from : CHUNK, i = 0;
    uniform(&twister, out + from, some);
    for (; i + 2 * WIDTH <= some; i += 2 * WIDTH) box_muller(out + from + i, out + from + i + WIDTH);
    if (i + WIDTH <= some) {
      float unused[WIDTH] = {0};
      box_muller(out + from + i, unused);
    }
  }
  if (n % WIDTH) { /* the last 16 are drawn anew */
    float unused[WIDTH] = {0};
    uniform(&twister, out + n - WIDTH, WIDTH);
    box_muller(out + n - WIDTH, unused);
  }
  write_state(&twister, state);
}

INLINE Reals load(const float* from, int64_t stride, int64_t i) { return stride ? *(const Reals*)(from + i) : all(*from); }

INLINE Reals log_density(Reals value, Reals loc, Reals scale, Reals log_scale) {
  Reals deviation = (value - loc) / scale;
  return -(log_scale + 0.5f * deviation * deviation + 0.91893853320467274178f);
}

/* Of n values under their distributions; a stride is 1, or 0 where all are the same. */
FOR_EACH_PROCESSOR
void normal_log_density(const float* value, int64_t value_stride, const float* loc, int64_t loc_stride, const float* scale,
                        int64_t scale_stride, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += CHUNK) {
    int64_t stop = n - i < CHUNK ? n : i + CHUNK, j = i;
    Words unusual = {};
    for (; j + WIDTH <= stop; j += WIDTH) {
      Reals s = load(scale, scale_stride, j);
      unusual |= (Words)s | ((Words)s - 0x00800000u) | (0x7f7fffffu - (Words)s);
      *(Reals*)(out + j) = log_density(load(value, value_stride, j), load(loc, loc_stride, j), s, logarithm(s));
    }
    uint32_t any = 0;
    for (int k = 0; k < WIDTH; ++k) any |= unusual[k];
    if (any >> 31) j = i; /* none, negative, subnormal, infinite or no number */
    for (; j < stop; ++j) {
      Reals s = all(scale[j * scale_stride]);
      out[j] = log_density(all(value[j * value_stride]), all(loc[j * loc_stride]), s, all(logf(s[0])))[0];
    }
  }
}

/* Of numbers in [-87, 0]. */
INLINE Reals exponential(Reals x) {
  Reals whole = x * 1.44269504088896341f + 0x1.8p23f; /* so large that what is left of it is the nearest whole number */
  Reals n = whole - 0x1.8p23f;
  x = x - n * 0.693359375f;
  x = x + n * 2.12194440e-4f;
  Reals y = 1.9875691500E-4f * x + 1.3981999507E-3f;
  y = y * x + 8.3334519073E-3f;
  y = y * x + 4.1665795894E-2f;
  y = y * x + 1.6666665459E-1f;
  y = y * x + 5.0000001201E-1f;
  y = y * (x * x) + x + 1.0f;
  return y * (Reals)(((Ints)whole + 127) << 23);
}

INLINE Reals larger(Reals x, Reals y) { return choose((Ints)(x - y) >> 31, y, x); }

INLINE double sum(Reals x) {
  double found = 0;
  for (int i = 0; i < WIDTH; ++i) found += x[i];
  return found;
}

enum { NEGLIGIBLE = -87 };

/* Normalise n rows of N log weights; for each row the log of their mean, the effective sample size and the largest share. */
FOR_EACH_PROCESSOR
void normalise(const float* log_weight, float* share, float* log_mean, float* size, float* largest, int64_t n, int64_t N) {
  for (int64_t row = 0; row < n; ++row, log_weight += N, share += N) {
    Reals most = all(-INFINITY);
    Words strange = {};
    float top = -INFINITY, none = 0;
    int64_t i = 0;
    for (; i + WIDTH <= N; i += WIDTH) {
      Reals x = *(const Reals*)(log_weight + i);
      most = larger(most, x);
      strange |= 0x7f800000u - ((Words)x & 0x7fffffffu); /* no number */
    }
    for (; i < N; ++i) {
      top = log_weight[i] > top ? log_weight[i] : top;
      none += isnan(log_weight[i]);
    }
    for (int k = 0; k < WIDTH; ++k) {
      top = most[k] > top ? most[k] : top;
      none += strange[k] >> 31;
    }
    if (none || isinf(top)) {
      for (i = 0; i < N; ++i) share[i] = NAN;
      log_mean[row] = size[row] = largest[row] = NAN;
      continue;
    }
    double total = 0, squares = 0;
    for (i = 0; i < N;) { /* in parts, whose roundings do not add up */
      int64_t stop = N - i < CHUNK ? N : i + CHUNK;
      Reals some = {}, squared = {};
      for (; i + WIDTH <= stop; i += WIDTH) {
        Reals x = *(const Reals*)(log_weight + i) - top;
        Ints there = ~((Ints)(x - (float)NEGLIGIBLE) >> 31);
        x = (Reals)((Ints)exponential(larger(all(NEGLIGIBLE), x)) & there);
        *(Reals*)(share + i) = x;
        some += x;
        squared += x * x;
      }
      for (; i < stop; ++i) {
        float x = expf(log_weight[i] - top);
        share[i] = x;
        total += x;
        squares += x * x;
      }
      total += sum(some);
      squares += sum(squared);
    }
    float scale = (float)(1 / total);
    for (i = 0; i < N; ++i) share[i] *= scale;
    log_mean[row] = (float)(top + log(total / (double)N));
    size[row] = (float)(total * total / squares);
    largest[row] = scale;
  }
}
