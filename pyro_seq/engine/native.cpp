// What an eager step of many particles spends its time on: normal numbers, the same as torch's bit for bit, their log density,
// and normalised weights. `native.py` says what for, and calls it.
//
// Sources: Matsumoto and Nishimura, Mersenne Twister, 1998; Box and Muller, A note on the generation of random normal deviates,
// 1958; Moshier, Cephes mathematical library, 1992, for the polynomials of log, exp, sin and cos in single precision.

#if __has_include(<Python.h>)  // to be an empty module for who imports all that a package holds
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int64_t CHUNK = 2048;  // numbers that stay in the first cache
constexpr int BLOCK = 16;        // of so many uniform numbers torch makes normal ones, the first half with the last
constexpr int WORDS = 624, AHEAD = 397;

struct Twister {
  uint32_t word[WORDS];
  int64_t next;  // the first one that has not been used
};

INLINE uint32_t twisted(uint32_t from, uint32_t next) {
  return (((from & 0x80000000u) | (next & 0x7fffffffu)) >> 1) ^ ((0u - (next & 1u)) & 0x9908b0dfu);
}

INLINE void turn(Twister& twister) {
  uint32_t* word = twister.word;
  for (int i = 0; i < WORDS - AHEAD; ++i) word[i] = word[i + AHEAD] ^ twisted(word[i], word[i + 1]);
  for (int i = WORDS - AHEAD; i < WORDS - 1; ++i) word[i] = word[i + AHEAD - WORDS] ^ twisted(word[i], word[i + 1]);
  word[WORDS - 1] = word[AHEAD - 1] ^ twisted(word[WORDS - 1], word[0]);
  twister.next = 0;
}

// Uniform numbers in [0, 1).
INLINE void uniform(Twister& twister, float* out, int64_t n) {
  while (n > 0) {
    if (twister.next == WORDS) turn(twister);
    const int64_t some = std::min<int64_t>(WORDS - twister.next, n);
    const uint32_t* word = twister.word + twister.next;
    for (int64_t i = 0; i < some; ++i) {
      uint32_t y = word[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680u;
      y ^= (y << 15) & 0xefc60000u;
      y ^= y >> 18;
      out[i] = (float)(int32_t)(y & 0xffffffu) * 0x1p-24f;
    }
    twister.next += some;
    out += some;
    n -= some;
  }
}

// The state as torch gives it: seed (64 bits), steps left, whether seeded (32 each), place, and 64 bits a word.
INLINE void read_state(Twister& twister, const uint8_t* state) {
  int32_t left;
  uint64_t next, words[WORDS];
  std::memcpy(&left, state + 8, sizeof left);
  std::memcpy(&next, state + 16, sizeof next);
  std::memcpy(words, state + 24, sizeof words);
  for (int i = 0; i < WORDS; ++i) twister.word[i] = (uint32_t)words[i];
  twister.next = left == 1 ? WORDS : (int64_t)next;
}

INLINE void write_state(const Twister& twister, uint8_t* state) {
  const int32_t left = (int32_t)(WORDS + 1 - twister.next);
  const uint64_t next = (uint64_t)twister.next;
  uint64_t words[WORDS];
  for (int i = 0; i < WORDS; ++i) words[i] = twister.word[i];
  std::memcpy(state + 8, &left, sizeof left);
  std::memcpy(state + 16, &next, sizeof next);
  std::memcpy(state + 24, words, sizeof words);
}

template <int WIDTH>
struct Vectors;  // vectors of a template's width are not known to all compilers
#define VECTORS(WIDTH)                                              \
  template <>                                                       \
  struct Vectors<WIDTH> {                                           \
    typedef float Reals __attribute__((vector_size(4 * WIDTH)));    \
    typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));   \
    typedef uint32_t Words __attribute__((vector_size(4 * WIDTH))); \
  };
VECTORS(8)
VECTORS(16)

// Of two vectors of 16.
#if defined(__clang__) || __GNUC__ >= 12
#define FIRST_HALVES(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define LAST_HALVES(a, b) __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#else
#define FIRST_HALVES(a, b) __builtin_shuffle(a, b, Ints{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23})
#define LAST_HALVES(a, b) __builtin_shuffle(a, b, Ints{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31})
#endif

// The kernels, on so many numbers at a time. Comparisons are of the numbers' bits: some compilers take vectors of truth values
// apart.
template <int WIDTH>
struct By {
  using Reals = typename Vectors<WIDTH>::Reals;
  using Ints = typename Vectors<WIDTH>::Ints;
  using Words = typename Vectors<WIDTH>::Words;

  INLINE Reals load(const float* from) {
    Reals x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  INLINE void store(float* to, Reals x) { std::memcpy(to, &x, sizeof x); }
  INLINE Reals all(float x) { return Reals{} + x; }
  INLINE Reals choose(Ints which, Reals yes, Reals no) { return (Reals)(((Ints)yes & which) | ((Ints)no & ~which)); }
  INLINE Reals larger(Reals x, Reals y) { return choose((Ints)(x - y) >> 31, y, x); }

  // Of positive, finite and normal numbers.
  INLINE Reals logarithm(Reals x) {
    Reals exponent = __builtin_convertvector(((Ints)x >> 23) - 126, Reals);
    x = (Reals)(((Ints)x & 0x007fffff) | 0x3f000000);  // in [1/2, 1)
    const Ints low = ((Ints)x - 0x3f3504f3) >> 31;     // below the root of 1/2
    const Reals once = (Reals)((Ints)x & low);
    x = x - 1.0f;
    exponent = exponent - (Reals)((Ints)all(1.0f) & low);
    x = x + once;
    const Reals square = x * x;
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

  // Of numbers in [-87, 0].
  INLINE Reals exponential(Reals x) {
    const Reals whole = x * 1.44269504088896341f + 0x1.8p23f;  // so large that what is left of it is the nearest whole number
    const Reals n = whole - 0x1.8p23f;
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

  INLINE void sine_and_cosine(Reals x, Reals& sine, Reals& cosine) {  // of x >= 0
    const Ints octant = (__builtin_convertvector(x * 1.27323954473516f, Ints) + 1) & ~1;
    const Reals y = __builtin_convertvector(octant, Reals);
    x = x + y * -0.78515625f;
    x = x + y * -2.4187564849853515625e-4f;
    x = x + y * -3.77489497744594108e-8f;
    const Reals square = x * x;
    Reals even = 2.443315711809948E-5f * square - 1.388731625493765E-3f;
    even = even * square + 4.166664568298827E-2f;
    even = even * square * square;
    even = even - square * 0.5f;
    even = even + 1.0f;
    Reals odd = -1.9515295891E-4f * square + 8.3321608736E-3f;
    odd = odd * square - 1.6666654611E-1f;
    odd = odd * square * x;
    odd = odd + x;
    const Ints as_is = ((octant & 2) >> 1) - 1;
    sine = (Reals)((Ints)choose(as_is, odd, even) ^ ((octant & 4) << 29));
    cosine = (Reals)((Ints)choose(as_is, even, odd) ^ ((~(octant - 2) & 4) << 29));
  }

  INLINE Reals square_root(Reals x) {
    for (int i = 0; i < WIDTH; ++i) x[i] = std::sqrt(x[i]);
    return x;
  }

  // u and v, uniform, become normal.
  INLINE void box_muller(Reals& u, Reals& v) {
    Reals sine, cosine;
    const Reals radius = square_root(-2.0f * logarithm(1.0f - u));
    sine_and_cosine(6.2831853071795864769f * v, sine, cosine);
    u = radius * cosine + 0.0f;  // no negative zeros
    v = radius * sine + 0.0f;
  }

  // n a multiple of BLOCK.
  INLINE void normal(float* out, int64_t n) {
    constexpr int HALF = BLOCK / 2;
    if constexpr (WIDTH <= HALF) {
      for (; n > 0; n -= BLOCK, out += BLOCK)
        for (int j = 0; j < HALF; j += WIDTH) {
          Reals u = load(out + j), v = load(out + HALF + j);
          box_muller(u, v);
          store(out + j, u);
          store(out + HALF + j, v);
        }
    } else {  // two blocks at a time
      for (; n >= 2 * BLOCK; n -= 2 * BLOCK, out += 2 * BLOCK) {
        const Reals one = load(out), other = load(out + BLOCK);
        Reals u = FIRST_HALVES(one, other), v = LAST_HALVES(one, other);
        box_muller(u, v);
        store(out, FIRST_HALVES(u, v));
        store(out + BLOCK, LAST_HALVES(u, v));
      }
      By<HALF>::normal(out, n);
    }
  }

  // What torch.Tensor.normal_ would write, for n >= BLOCK; the state of its generator goes on alike.
  INLINE void standard_normal(uint8_t* state, float* out, int64_t n) {
    Twister twister;
    read_state(twister, state);
    for (int64_t from = 0; from < n; from += CHUNK) {
      const int64_t some = std::min(CHUNK, n - from);
      uniform(twister, out + from, some);
      normal(out + from, some / BLOCK * BLOCK);
    }
    if (n % BLOCK) {  // the last ones are drawn anew
      uniform(twister, out + n - BLOCK, BLOCK);
      normal(out + n - BLOCK, BLOCK);
    }
    write_state(twister, state);
  }

  INLINE Reals load(const float* from, int64_t stride, int64_t i) { return stride ? load(from + i) : all(*from); }

  // The numbers that are left at the end go the same way as the others, among those of a filler.
  INLINE Reals load_some(const float* from, int64_t count, float filler) {
    Reals x = all(filler);
    std::memcpy(&x, from, sizeof(float) * count);
    return x;
  }
  INLINE Reals load_some(const float* from, int64_t stride, int64_t i, int64_t count) {
    return stride ? load_some(from + i, count, 1) : all(*from);
  }

  INLINE Reals log_density(Reals value, Reals loc, Reals scale, Reals log_scale) {
    const Reals deviation = (value - loc) / scale;
    return -(log_scale + 0.5f * deviation * deviation + 0.91893853320467274178f);
  }

  // The sign bits say of which numbers `logarithm` is not: zero, negative, subnormal, infinite or none.
  INLINE Words unusual(Reals x) { return (Words)x | ((Words)x - 0x00800000u) | (0x7f7fffffu - (Words)x); }

  // Of n values under their distributions; a stride is 1, or 0 where all are the same.
  INLINE void normal_log_density(const float* value, int64_t value_stride, const float* loc, int64_t loc_stride,
                                 const float* scale, int64_t scale_stride, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += CHUNK) {
      const int64_t stop = std::min(n, i + CHUNK);
      int64_t j = i;
      Words found{};
      for (; j + WIDTH <= stop; j += WIDTH) {
        const Reals s = load(scale, scale_stride, j);
        found |= unusual(s);
        store(out + j, log_density(load(value, value_stride, j), load(loc, loc_stride, j), s, logarithm(s)));
      }
      if (const int64_t left = stop - j) {
        const Reals s = load_some(scale, scale_stride, j, left);
        found |= unusual(s);
        const Reals last = log_density(load_some(value, value_stride, j, left), load_some(loc, loc_stride, j, left), s,
                                       logarithm(s));
        std::memcpy(out + j, &last, sizeof(float) * left);
      }
      uint32_t any = 0;
      for (int k = 0; k < WIDTH; ++k) any |= found[k];
      if (any >> 31)
        for (j = i; j < stop; ++j) {
          const Reals s = all(scale[j * scale_stride]);
          if (unusual(s)[0] >> 31)
            out[j] = log_density(all(value[j * value_stride]), all(loc[j * loc_stride]), s, all(std::log(s[0])))[0];
        }
    }
  }

  INLINE double sum(Reals x) {
    double found = 0;
    for (int i = 0; i < WIDTH; ++i) found += x[i];
    return found;
  }

  INLINE Words no_number(Reals x) { return 0x7f800000u - ((Words)x & 0x7fffffffu); }  // by the sign bits

  // The exponential of what is not above zero; zero where it is negligible.
  INLINE Reals shared(Reals x) {
    constexpr float NEGLIGIBLE = -87;
    const Ints there = ~((Ints)(x - NEGLIGIBLE) >> 31);
    return (Reals)((Ints)exponential(larger(all(NEGLIGIBLE), x)) & there);
  }

  // Normalise n rows of N log weights; for each row the log of their mean, the effective sample size and the largest share.
  INLINE void normalise(const float* log_weight, float* share, float* log_mean, float* size, float* largest, int64_t n,
                        int64_t N) {
    for (int64_t row = 0; row < n; ++row, log_weight += N, share += N) {
      const int64_t whole = N / WIDTH * WIDTH, left = N - whole;
      Reals most = load_some(log_weight + whole, left, -INFINITY);
      Words strange = no_number(most);
      for (int64_t i = 0; i < whole; i += WIDTH) {
        const Reals x = load(log_weight + i);
        most = larger(most, x);
        strange |= no_number(x);
      }
      float top = -INFINITY;
      bool none = false;
      for (int k = 0; k < WIDTH; ++k) {
        top = std::max(top, most[k]);
        none |= strange[k] >> 31;
      }
      if (none || std::isinf(top)) {
        std::fill_n(share, N, NAN);
        log_mean[row] = size[row] = largest[row] = NAN;
        continue;
      }
      const Reals last = shared(load_some(log_weight + whole, left, -INFINITY) - top);
      std::memcpy(share + whole, &last, sizeof(float) * left);
      double total = sum(last), squares = sum(last * last);
      for (int64_t i = 0; i < whole;) {  // in parts, whose roundings do not add up
        const int64_t stop = std::min(whole, i + CHUNK);
        Reals some{}, squared{};
        for (; i < stop; i += WIDTH) {
          const Reals e = shared(load(log_weight + i) - top);
          store(share + i, e);
          some += e;
          squared += e * e;
        }
        total += sum(some);
        squares += sum(squared);
      }
      const float scale = (float)(1 / total);
      for (int64_t i = 0; i < N; ++i) share[i] *= scale;
      log_mean[row] = (float)(top + std::log(total / (double)N));
      size[row] = (float)(total * total / squares);
      largest[row] = scale;
    }
  }
};

}  // namespace

// Each kernel is compiled for registers of 512 bits, of 256, and for whatever there is, where it draws other numbers than torch.
#if defined(__x86_64__)
#define EXPORT(name, parameters, arguments)                                                                           \
  __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))) static void name##_512 parameters {          \
    By<16>::name arguments;                                                                                           \
  }                                                                                                                   \
  __attribute__((target("avx2,fma"))) static void name##_256 parameters { By<8>::name arguments; }                    \
  extern "C" void name parameters {                                                                                   \
    const bool half = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");                                \
    const bool full = half && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&              \
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");                       \
    full ? name##_512 arguments : half ? name##_256 arguments : By<8>::name arguments;                                \
  }
#else
#define EXPORT(name, parameters, arguments) \
  extern "C" void name parameters { By<8>::name arguments; }
#endif

EXPORT(standard_normal, (uint8_t* state, float* out, int64_t n), (state, out, n))

EXPORT(normal_log_density,
       (const float* value, int64_t value_stride, const float* loc, int64_t loc_stride, const float* scale,
        int64_t scale_stride, float* out, int64_t n),
       (value, value_stride, loc, loc_stride, scale, scale_stride, out, n))

EXPORT(normalise,
       (const float* log_weight, float* share, float* log_mean, float* size, float* largest, int64_t n, int64_t N),
       (log_weight, share, log_mean, size, largest, n, N))
