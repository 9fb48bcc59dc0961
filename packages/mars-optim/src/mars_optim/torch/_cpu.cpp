// One MARS step on flat tensors, blocked for the cache. Compiled on first use by _cpu.py; the truth is
// _loop.py.
//
//   c = g + a (g - h);  c /= max(1, |c| / clip);  m = beta1 m + (1 - beta1) c;  v = beta2 v + (1 - beta2) c^2
//   x = (1 - decay) x - step_size m / (sqrt(v) root_scale + eps)            lion: - step_size sign(m), ...
//
// The clip needs |c| before anything is written, so g and h are read twice. A tensor whose g and h fit the
// core's own cache is done by one thread from start to end; a larger one is shared out, and each thread takes
// the runs of its part in the opposite order the second time, so that what it read last is still in the cache.
// (Runs, not blocks: memory is fetched ahead in ascending order, and turning around every few kB undoes that.)
// Sums of squares are taken per block and added in block order: the result does not depend on the number of
// threads.
//
// Streams may have any of four dtypes. A stream of the working dtype is used in place, another one is
// converted block by block; arithmetic is always in the working dtype.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t BLOCK = 4096;
constexpr int64_t RUN = 16;  // blocks
constexpr int64_t OWN_CACHE_BYTES = 256 * 1024;  // of g and h: half the second-level cache of a small core

enum Stream { PARAM, GRAD, REFERENCE, AVERAGE, SECOND, LARGEST, STORE, STREAMS };
enum Dtype : int32_t { ABSENT, FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum Kind : int32_t { ADAMW, LION, SGD, MOMENTUM };  // MOMENTUM: the parameter is somebody else's task
enum Clip : int32_t { OFF, GIVEN, OWN };

}  // namespace

extern "C" {

// Mirrored by _Job in _cpu.py. All arrays have one entry per tensor.
struct Job {
  int64_t count;
  const int64_t* sizes;               // elements
  const int64_t* addresses[STREAMS];  // unused where the dtype is ABSENT
  const double* step_sizes;           // eta, over the bias correction of the momentum
  const double* root_scales;          // 1 / sqrt(bias correction of the second moment)
  const double* epsilons;
  void* divisors;     // working dtype; read when GIVEN, written when OWN
  double* partials;   // one per block of every tensor, when OWN
  double correction;  // a = gamma beta1 / (1 - beta1)
  double clip, beta1, beta2, gamma, decay;
  uint64_t noise;  // seed of this step's stochastic roundings
  int32_t dtypes[STREAMS];
  int32_t working;
  int32_t kind, clipping;
  int32_t quasi_hyperbolic, second_of_gradient, cautious_decay, stochastic_rounding;
  int32_t threads;
};
}

namespace {

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float from_bfloat16(uint16_t half) { return bits_to_float(uint32_t(half) << 16); }

// Round to nearest, ties to even; a NaN stays one.
uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return value != value ? uint16_t(0x7fc0) : uint16_t(rounded >> 16);
}

// A bijection of 64 bits under which counters look random (finaliser of SplitMix64, Steele et al. 2014).
uint64_t scrambled(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Round up or down at random, right in the mean: the carry out of the cut bits decides. Truth:
// rounding.stochastic_round_.
uint16_t to_bfloat16(float value, uint32_t noise) {
  const uint32_t bits = float_to_bits(value);
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  return finite ? uint16_t((bits + (noise & 0xffff)) >> 16) : to_bfloat16(value);
}

float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  const float scaled = bits_to_float(magnitude << 13) * 0x1p112f;  // exact, subnormals too
  const uint32_t bits = magnitude >= 0x7c00 ? 0x7f800000 | (magnitude << 13) : float_to_bits(scaled);
  return bits_to_float(sign | bits);
}

uint16_t to_float16(float value) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // adding 1/2 leaves the last place of a subnormal half, so the addition itself rounds
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // 65520 and more round to infinity
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return uint16_t(sign | half);
}

template <class T>
constexpr Dtype dtype_of() {
  return sizeof(T) == 4 ? FLOAT32 : FLOAT64;
}

int64_t bytes_of(int32_t dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : dtype == ABSENT ? 0 : 2; }

// The n values at `address` in the working dtype: in place, or converted into the scratch.
template <class T>
T* load(char* address, int32_t dtype, T* scratch, int64_t n) {
  if (dtype == dtype_of<T>()) return reinterpret_cast<T*>(address);
  if (dtype == FLOAT32) {
    const float* values = reinterpret_cast<float*>(address);
    for (int64_t i = 0; i < n; ++i) scratch[i] = T(values[i]);
  } else if (dtype == FLOAT64) {
    const double* values = reinterpret_cast<double*>(address);
    for (int64_t i = 0; i < n; ++i) scratch[i] = T(values[i]);
  } else if (dtype == BFLOAT16) {
    const uint16_t* values = reinterpret_cast<uint16_t*>(address);
    for (int64_t i = 0; i < n; ++i) scratch[i] = T(from_bfloat16(values[i]));
  } else if (dtype == FLOAT16) {
    const uint16_t* values = reinterpret_cast<uint16_t*>(address);
    for (int64_t i = 0; i < n; ++i) scratch[i] = T(from_float16(values[i]));
  }
  return scratch;
}

// Rounds n values into a stream of any dtype; values that are the stream already stay where they are.
template <class T>
void store(char* address, int32_t dtype, const T* values, int64_t n) {
  if (reinterpret_cast<const char*>(values) == address) return;
  if (dtype == dtype_of<T>()) {
    std::memcpy(address, values, n * sizeof(T));
  } else if (dtype == FLOAT32) {
    float* stored = reinterpret_cast<float*>(address);
    for (int64_t i = 0; i < n; ++i) stored[i] = float(values[i]);
  } else if (dtype == FLOAT64) {
    double* stored = reinterpret_cast<double*>(address);
    for (int64_t i = 0; i < n; ++i) stored[i] = double(values[i]);
  } else if (dtype == BFLOAT16) {
    uint16_t* stored = reinterpret_cast<uint16_t*>(address);
    for (int64_t i = 0; i < n; ++i) stored[i] = to_bfloat16(float(values[i]));
  } else if (dtype == FLOAT16) {
    uint16_t* stored = reinterpret_cast<uint16_t*>(address);
    for (int64_t i = 0; i < n; ++i) stored[i] = to_float16(float(values[i]));
  }
}

template <class T>
void store_at_random(char* address, const T* values, int64_t n, uint64_t seed) {
  uint16_t* stored = reinterpret_cast<uint16_t*>(address);
  for (int64_t i = 0; i < n; ++i) stored[i] = to_bfloat16(float(values[i]), uint32_t(scrambled(seed + i)));
}

template <class T>
struct Scratch {
  alignas(64) T values[STREAMS][BLOCK];
};

template <class T>
class Step {
 public:
  explicit Step(const Job& job) : job_(job) {}

  int64_t blocks(int64_t tensor) const { return (job_.sizes[tensor] + BLOCK - 1) / BLOCK; }

  double sum_of_squares(int64_t tensor, int64_t block, Scratch<T>& scratch) const {
    const int64_t n = length(tensor, block);
    const T* g = loaded(GRAD, tensor, block, scratch, n);
    T sum = 0;
    if (job_.dtypes[REFERENCE] == ABSENT) {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += g[i] * g[i];
    } else {
      const T* h = loaded(REFERENCE, tensor, block, scratch, n);
      const T a = T(job_.correction);
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) {
        const T c = (g[i] - h[i]) * a + g[i];
        sum += c * c;
      }
    }
    return sum;
  }

  // max(1, norm / clip), and NaN where the norm is infinite or NaN.
  T divisor(double sum) const {
    const T norm = T(std::sqrt(sum));
    return std::max(T(1), T(norm / T(job_.clip))) + norm * T(0);
  }

  void update(int64_t tensor, int64_t block, T divisor, Scratch<T>& scratch) const {
    const bool plain = !(job_.quasi_hyperbolic || job_.second_of_gradient || job_.cautious_decay ||
                         job_.dtypes[LARGEST] != ABSENT);
    switch (job_.kind) {
      case ADAMW: return plain ? run<ADAMW, true>(tensor, block, divisor, scratch)
                               : run<ADAMW, false>(tensor, block, divisor, scratch);
      case LION: return plain ? run<LION, true>(tensor, block, divisor, scratch)
                              : run<LION, false>(tensor, block, divisor, scratch);
      case SGD: return plain ? run<SGD, true>(tensor, block, divisor, scratch)
                             : run<SGD, false>(tensor, block, divisor, scratch);
      default: return run<MOMENTUM, true>(tensor, block, divisor, scratch);
    }
  }

 private:
  template <Kind KIND, bool PLAIN>
  void run(int64_t tensor, int64_t block, T divisor, Scratch<T>& scratch) const {
    const int64_t n = length(tensor, block);
    const T* g = loaded(GRAD, tensor, block, scratch, n);
    T* x = KIND == MOMENTUM ? nullptr : loaded(PARAM, tensor, block, scratch, n);
    T* m = loaded(AVERAGE, tensor, block, scratch, n);
    T* v = KIND == ADAMW ? loaded(SECOND, tensor, block, scratch, n) : nullptr;
    const bool amsgrad = !PLAIN && job_.dtypes[LARGEST] != ABSENT;
    T* largest = amsgrad ? loaded(LARGEST, tensor, block, scratch, n) : nullptr;
    if (job_.dtypes[REFERENCE] == ABSENT) {
      arithmetic<KIND, PLAIN, false>(tensor, n, divisor, x, g, nullptr, m, v, largest);
    } else {
      const T* h = loaded(REFERENCE, tensor, block, scratch, n);
      arithmetic<KIND, PLAIN, true>(tensor, n, divisor, x, g, h, m, v, largest);
    }
    if (job_.dtypes[STORE] != ABSENT) store(at(STORE, tensor, block), job_.dtypes[STORE], g, n);
    store(at(AVERAGE, tensor, block), job_.dtypes[AVERAGE], m, n);
    if (KIND == ADAMW) store(at(SECOND, tensor, block), job_.dtypes[SECOND], v, n);
    if (amsgrad) store(at(LARGEST, tensor, block), job_.dtypes[LARGEST], largest, n);
    if (KIND == MOMENTUM) return;
    if (job_.stochastic_rounding && job_.dtypes[PARAM] == BFLOAT16) {
      const uint64_t seed = scrambled(job_.noise + scrambled(tensor)) + block * BLOCK;
      store_at_random(at(PARAM, tensor, block), x, n, seed);
    } else {
      store(at(PARAM, tensor, block), job_.dtypes[PARAM], x, n);
    }
  }

  template <Kind KIND, bool PLAIN, bool CORRECTED>
  void arithmetic(int64_t tensor, int64_t n, T divisor, T* __restrict x, const T* g, const T* h,
                  T* __restrict m, T* __restrict v, T* __restrict largest) const {
    const T a = T(job_.correction), inverse = T(1) / divisor;
    const T beta1 = T(job_.beta1), rest1 = T(1 - job_.beta1), beta2 = T(job_.beta2), rest2 = T(1 - job_.beta2);
    const T size = T(job_.step_sizes[tensor]), scale = T(job_.root_scales[tensor]);
    const T eps = T(job_.epsilons[tensor]), kept = T(1 - job_.decay), decay = T(job_.decay), gamma = T(job_.gamma);
    const bool quasi = !PLAIN && job_.quasi_hyperbolic, of_gradient = !PLAIN && job_.second_of_gradient;
    const bool cautious = !PLAIN && job_.cautious_decay, amsgrad = !PLAIN && largest != nullptr;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T c = (CORRECTED ? (g[i] - h[i]) * a + g[i] : g[i]) * inverse;
      const T average = m[i] * beta1 + c * rest1;
      m[i] = average;
      if constexpr (KIND != MOMENTUM) {
        const T momentum = quasi ? average + (g[i] - average) * gamma : average;
        T u;
        if (KIND == ADAMW) {
          const T squared = of_gradient ? g[i] : c;
          T second = v[i] * beta2 + squared * squared * rest2;
          v[i] = second;
          if (amsgrad) {
            second = second > largest[i] || second != second ? second : largest[i];
            largest[i] = second;
          }
          u = momentum / (std::sqrt(second) * scale + eps);
        } else {
          // NaN stays NaN, where the comparisons would make a silent zero step of it
          u = KIND == LION ? T(momentum > 0) - T(momentum < 0) + momentum * T(0) : momentum;
        }
        const T shrunk = cautious ? x[i] * (T(1) - (u * x[i] >= 0 ? decay : T(0))) : x[i] * kept;
        x[i] = shrunk - u * size;
      }
    }
  }

  int64_t length(int64_t tensor, int64_t block) const {
    return std::min(BLOCK, job_.sizes[tensor] - block * BLOCK);
  }

  char* at(Stream stream, int64_t tensor, int64_t block) const {
    const int64_t offset = block * BLOCK * bytes_of(job_.dtypes[stream]);
    return reinterpret_cast<char*>(job_.addresses[stream][tensor] + offset);
  }

  T* loaded(Stream stream, int64_t tensor, int64_t block, Scratch<T>& scratch, int64_t n) const {
    return load<T>(at(stream, tensor, block), job_.dtypes[stream], scratch.values[stream], n);
  }

  const Job& job_;
};

template <class T>
void run(const Job& job) {
  const Step<T> step(job);
  T* divisors = static_cast<T*>(job.divisors);
  const bool own = job.clipping == OWN;
  std::vector<int64_t> small, large;
  std::vector<int64_t> first_partial(job.count + 1, 0);
  const int64_t bytes = bytes_of(job.dtypes[GRAD]) + bytes_of(job.dtypes[REFERENCE]);
  for (int64_t t = 0; t < job.count; ++t) {
    (job.sizes[t] * bytes <= OWN_CACHE_BYTES ? small : large).push_back(t);
    first_partial[t + 1] = first_partial[t] + step.blocks(t);
  }
  const auto divisor_from = [&](int64_t t) {
    double sum = 0;
    for (int64_t b = first_partial[t]; b < first_partial[t + 1]; ++b) sum += job.partials[b];
    return step.divisor(sum);
  };
  const auto start_of = [&](int64_t share, int64_t t) { return share * step.blocks(t) / job.threads; };

#pragma omp parallel num_threads(job.threads)
  {
    Scratch<T> scratch;
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t s = 0; s < int64_t(small.size()); ++s) {
      const int64_t t = small[s];
      if (own) {
        double sum = 0;
        for (int64_t b = 0; b < step.blocks(t); ++b) sum += step.sum_of_squares(t, b, scratch);
        divisors[t] = step.divisor(sum);
      }
      const T divisor = job.clipping == OFF ? T(1) : divisors[t];
      for (int64_t b = 0; b < step.blocks(t); ++b) step.update(t, b, divisor, scratch);
    }
    for (const int64_t t : large) {
      if (own) {
#pragma omp for schedule(static)
        for (int64_t share = 0; share < job.threads; ++share) {
          for (int64_t b = start_of(share, t); b < start_of(share + 1, t); ++b) {
            job.partials[first_partial[t] + b] = step.sum_of_squares(t, b, scratch);
          }
        }
      }
      // every thread adds the same numbers in the same order
      const T divisor = own ? divisor_from(t) : job.clipping == GIVEN ? divisors[t] : T(1);
#pragma omp for schedule(static) nowait
      for (int64_t share = 0; share < job.threads; ++share) {
        const int64_t from = start_of(share, t);
        for (int64_t end = start_of(share + 1, t); end > from; end -= RUN) {
          for (int64_t b = std::max(from, end - RUN); b < end; ++b) step.update(t, b, divisor, scratch);
        }
      }
#pragma omp single nowait
      if (own) divisors[t] = divisor;
    }
  }
}

}  // namespace

// Adds one to every counter and says what it is now: a list operation on a thousand scalars takes milliseconds.
extern "C" void mars_count(int64_t count, const int64_t* addresses, double* values) {
  for (int64_t i = 0; i < count; ++i) {
    float* counter = reinterpret_cast<float*>(addresses[i]);
    values[i] = *counter += 1;
  }
}

extern "C" void mars_step(const Job* job) {
  if (job->working == FLOAT64) {
    run<double>(*job);
  } else {
    run<float>(*job);
  }
}
