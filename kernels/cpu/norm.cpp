// Root mean square norm (Zhang & Sennrich 2019), token by token:
//     out[t, k] = weight[k] * round(inputs[t, k] / sqrt(mean_k(inputs[t, k]^2) + epsilon))
// with the mean in float32 and round to the dtype of the inputs, in which models multiply by their weight. Or of a sum
// that is wanted as well, inputs + delta, rounded; without a weight that sum alone.

#include "common24.h"

namespace {

template <class T>
struct Norm {
  const T *inputs, *weight;
  T* out;
  int64_t columns;
  float epsilon;
  const T* delta = nullptr;
  T* sum = nullptr;
};

// Plain loops that the compiler makes vectors of, as wide as the function that they are part of allows.
template <class T>
__attribute__((always_inline)) inline void norm_token(const Norm<T>& p, int64_t t) {
  const T* x = p.inputs + t * p.columns;
  T* out = p.out + t * p.columns;
  if (p.delta) {
    T* sum = p.sum + t * p.columns;
    for (int64_t k = 0; k < p.columns; k++) store(to_float(x[k]) + to_float(p.delta[t * p.columns + k]), sum + k);
    x = sum;
  }
  if (!p.weight) return;
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t k = 0; k < p.columns; k++) squares += to_float(x[k]) * to_float(x[k]);
  const float scale = 1 / std::sqrt(squares / float(p.columns) + p.epsilon);
  for (int64_t k = 0; k < p.columns; k++) {
    T normed;
    store(to_float(x[k]) * scale, &normed);
    store(to_float(p.weight[k]) * to_float(normed), out + k);
  }
}

template <class T>
void tokens_plain(const Norm<T>& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; t++) norm_token(p, t);
}

#if X86
template <class T>
AVX2 void tokens_avx2(const Norm<T>& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; t++) norm_token(p, t);
}
#endif

template <class T>
void norm(const Norm<T>& p, int64_t tokens, int threads, int level) {
  void (*normalise)(const Norm<T>&, int64_t, int64_t) = tokens_plain<T>;
#if X86
  if (level >= kAvx2) normalise = tokens_avx2<T>;
#endif
  in_parallel(tokens, threads, [&](int64_t begin, int64_t end) { normalise(p, begin, end); });
}

}  // namespace

extern "C" {

// inputs and out [tokens, columns], weight [columns].
void sparse24_norm_bf16(const bf16* inputs, const bf16* weight, bf16* out, int64_t columns, int64_t tokens,
                        float epsilon, int threads, int level) {
  norm<bf16>({inputs, weight, out, columns, epsilon}, tokens, threads, level);
}

// The same for float32.
void sparse24_norm_f32(const float* inputs, const float* weight, float* out, int64_t columns, int64_t tokens,
                       float epsilon, int threads, int level) {
  norm<float>({inputs, weight, out, columns, epsilon}, tokens, threads, level);
}

// sum = inputs + delta [tokens, columns], and out its norm; weight [columns], or null for the sum alone.
void sparse24_residual_bf16(const bf16* inputs, const bf16* delta, bf16* sum, const bf16* weight, bf16* out,
                            int64_t columns, int64_t tokens, float epsilon, int threads, int level) {
  norm<bf16>({inputs, weight, out, columns, epsilon, delta, sum}, tokens, threads, level);
}

void sparse24_residual_f32(const float* inputs, const float* delta, float* sum, const float* weight, float* out,
                           int64_t columns, int64_t tokens, float epsilon, int threads, int level) {
  norm<float>({inputs, weight, out, columns, epsilon, delta, sum}, tokens, threads, level);
}

}  // extern "C"
