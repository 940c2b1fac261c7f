// What lies between the products of a decoder block for one token (Vaswani et al. 2017; rotary positions, Su et al.
// 2021; shared keys, Ainslie et al. 2023):
//     attend   q and k turned by the token's position; k and v appended to those before; softmax(scaling q K^T) V
//     gate     silu(gate) * up
//
// What a model rounds to its dtype on the way is rounded here too, so that the keys kept are its own; scores, weights and
// sums are float32.

#include "common24.h"

namespace {

template <class T>
float rounded(float value) {
  T result;
  store(value, &result);
  return to_float(result);
}

// exp(x) for x <= 0, within 2 ulp: 2^n e^r with |r| <= log(2) / 2. A polynomial, as calls do not become vectors.
inline float exponential(float x) {
  x = std::max(x, -87.0f);
  const int32_t n = int32_t(x * 1.44269504f - 0.5f);
  const float r = (x - float(n) * 0.693359375f) + float(n) * 2.12194440e-4f;
  float e = 1.9875691500e-4f;
  for (float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    e = e * r + term;
  e = e * r * r + r + 1;
  const int32_t bits = (n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return e * power;
}

// Heads of q [heads, size] share keys and values [shared, capacity, size], of which `length` are there.
template <class T>
struct Attention {
  const T *q, *k, *v, *cos, *sin;
  T *keys, *values, *out;
  int64_t heads, shared, size, length, capacity;
  float scaling;
};

// x [size] turned: x cos + rotate_half(x) sin.
template <class T>
inline void turn(const Attention<T>& p, const T* x, float* turned) {
  for (int64_t i = 0; i < p.size; i++) {
    const float other = i < p.size / 2 ? -to_float(x[i + p.size / 2]) : to_float(x[i - p.size / 2]);
    const float straight = rounded<T>(to_float(x[i]) * to_float(p.cos[i]));
    turned[i] = rounded<T>(straight + rounded<T>(other * to_float(p.sin[i])));
  }
}

template <class T>
__attribute__((always_inline)) inline float dot(const float* q, const T* key, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; i++) sum += q[i] * to_float(key[i]);
  return sum;
}

// scores [count] become their softmax without the division; returns by what to divide.
__attribute__((always_inline)) inline float soften(float* scores, int64_t count) {
  float most = scores[0], sum = 0;
  for (int64_t t = 1; t < count; t++) most = std::max(most, scores[t]);
#pragma omp simd reduction(+ : sum)
  for (int64_t t = 0; t < count; t++) {
    scores[t] = exponential(scores[t] - most);
    sum += scores[t];
  }
  return sum;
}

// sums [size] += weights [count] times values [count, size]; four values at a time, between which sums stay where they are.
template <class T>
__attribute__((always_inline)) inline void add_values(const float* weights, const T* values, int64_t count,
                                                      int64_t size, float* sums) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4, values += 4 * size) {
    const T *b = values + size, *c = b + size, *d = c + size;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
      sums[i] += weights[t] * to_float(values[i]) + weights[t + 1] * to_float(b[i]) +
                 (weights[t + 2] * to_float(c[i]) + weights[t + 3] * to_float(d[i]));
    }
  }
  for (; t < count; t++, values += size) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) sums[i] += weights[t] * to_float(values[i]);
  }
}

template <class T>
__attribute__((always_inline)) inline void attend_head(const Attention<T>& p, int64_t h, float* room) {
  const int64_t each = p.heads / p.shared, g = h / each;
  float *q = room, *k = q + p.size, *sums = k + p.size, *scores = sums + p.size;
  turn(p, p.q + h * p.size, q);
  turn(p, p.k + g * p.size, k);
  T *keys = p.keys + g * p.capacity * p.size, *values = p.values + g * p.capacity * p.size;
  if (h % each == 0) {  // the other heads of the group read what was there before
    for (int64_t i = 0; i < p.size; i++) store(k[i], keys + p.length * p.size + i);
    std::copy(p.v + g * p.size, p.v + (g + 1) * p.size, values + p.length * p.size);
  }
  for (int64_t t = 0; t < p.length; t++) scores[t] = p.scaling * dot(q, keys + t * p.size, p.size);
  scores[p.length] = p.scaling * dot(q, k, p.size);
  const float total = soften(scores, p.length + 1);
  std::fill(sums, sums + p.size, 0.0f);
  add_values(scores, values, p.length, p.size, sums);
  add_values(scores + p.length, p.v + g * p.size, 1, p.size, sums);
  for (int64_t i = 0; i < p.size; i++) store(sums[i] / total, p.out + h * p.size + i);
}

// out = silu(gate) * up over begin..end.
template <class T>
struct Gate {
  const T *gate, *up;
  T* out;
};
template <class T>
__attribute__((always_inline)) inline void gate_some(const Gate<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const float x = to_float(p.gate[i]), small = exponential(-std::fabs(x));
    const float activated = rounded<T>((x < 0 ? x * small : x) / (1 + small));
    store(activated * to_float(p.up[i]), p.out + i);
  }
}

// One function for each instruction set, of plain loops that the compiler makes vectors of.
#define PATH(NAME, TARGET)                                                                  \
  template <class T>                                                                        \
  struct NAME {                                                                             \
    TARGET static void attend(const Attention<T>& p, int64_t h, float* room) {              \
      attend_head(p, h, room);                                                              \
    }                                                                                       \
    TARGET static void gate(const Gate<T>& p, int64_t begin, int64_t end) { gate_some(p, begin, end); } \
  };
PATH(Plain, )
#if X86
PATH(Avx2, AVX2)
PATH(Avx512, AVX512)
#endif

template <class T>
void attend(const Attention<T>& p, int threads, int level) {
  auto head = Plain<T>::attend;
#if X86
  if (level >= kAvx2) head = Avx2<T>::attend;
  if (level >= kAvx512) head = Avx512<T>::attend;
#endif
  in_steps(p.heads, 1, threads, [&](int64_t h, int64_t) {
    std::vector<float> room(3 * p.size + p.length + 1);
    head(p, h, room.data());
  });
}

template <class T>
void gate(const Gate<T>& p, int64_t count, int threads, int level) {
  auto some = Plain<T>::gate;
#if X86
  if (level >= kAvx2) some = Avx2<T>::gate;
  if (level >= kAvx512) some = Avx512<T>::gate;
#endif
  in_parallel(count, threads, [&](int64_t begin, int64_t end) { some(p, begin, end); });
}

}  // namespace

extern "C" {

// q and out [heads, size], k and v [shared, size], cos and sin [size], keys and values [shared, capacity, size], into
// whose row `length` k and v go.
#define DECODE(SUFFIX, T)                                                                                             \
  void sparse24_attend_##SUFFIX(const T* q, const T* k, const T* v, const T* cos, const T* sin, T* keys, T* values,   \
                                T* out, int64_t heads, int64_t shared, int64_t size, int64_t length,                  \
                                int64_t capacity, float scaling, int threads, int level) {                            \
    attend<T>({q, k, v, cos, sin, keys, values, out, heads, shared, size, length, capacity, scaling}, threads, level); \
  }                                                                                                                   \
  void sparse24_gate_##SUFFIX(const T* gated, const T* up, T* out, int64_t count, int threads, int level) {           \
    gate<T>({gated, up, out}, count, threads, level);                                                                 \
  }
DECODE(bf16, bf16)
DECODE(f32, float)

}  // extern "C"
