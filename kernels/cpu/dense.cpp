// Products with a dense bfloat16 weight on a CPU without bfloat16 products, for the layers of a packed model that stay
// dense, such as its head:  out[t, n] = sum_k weight[n, k] * inputs[t, k] + bias[n].
//
// With few tokens reading the weight is all the time there is; what libraries do on such machines to emulate bfloat16
// products takes two to three times as long. Here inputs and weights are widened to float32, eight weights at a time
// between load and multiply-add; AVX2 already waits for memory.

#include "common24.h"

namespace {

struct Dense {
  const bf16* weight;
  const float* inputs;
  int64_t columns, tokens;
  Output<bf16> to;
};

float dot(const Dense& p, int64_t n, int64_t t, int64_t from) {
  float sum = 0;
  for (int64_t k = from; k < p.columns; k++) sum += to_float(p.weight[n * p.columns + k]) * p.inputs[t * p.columns + k];
  return sum;
}

void rows_plain(const Dense& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n++)
    for (int64_t t = 0; t < p.tokens; t++) p.to.put(n, t, dot(p, n, t, 0));
}

#if X86

AVX2 inline __m256 load_eight(const bf16* weight) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)weight));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// ROWS rows times TOKENS tokens with STEPS independent sums each, while the tile after the next is fetched.
template <int ROWS, int TOKENS, int STEPS>
AVX2 void tile(const Dense& p, int64_t n, int64_t first) {
  const bf16* weight = p.weight + n * p.columns;
  const float* x = p.inputs + first * p.columns;
  __m256 sums[ROWS][TOKENS][STEPS];
  for (auto& row : sums)
    for (auto& token : row)
      for (auto& sum : token) sum = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 8 * STEPS <= p.columns; k += 8 * STEPS) {
    const char* ahead = (const char*)(weight + ROWS * (2 * p.columns + k));
    for (int line = 0; line < (ROWS * STEPS * 16 + 63) / 64; line++) _mm_prefetch(ahead + 64 * line, _MM_HINT_T1);
    for (int step = 0; step < STEPS; step++)
      for (int r = 0; r < ROWS; r++) {
        __m256 eight = load_eight(weight + r * p.columns + k + 8 * step);
        for (int t = 0; t < TOKENS; t++) {
          __m256 inputs = _mm256_loadu_ps(x + t * p.columns + k + 8 * step);
          sums[r][t][step] = _mm256_fmadd_ps(eight, inputs, sums[r][t][step]);
        }
      }
  }
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < TOKENS; t++) {
      __m256 sum = sums[r][t][0];
      for (int step = 1; step < STEPS; step++) sum = _mm256_add_ps(sum, sums[r][t][step]);
      p.to.put(n + r, first + t, sum_lanes(sum) + dot(p, n + r, first + t, k));
    }
}

AVX2 void rows_avx2(const Dense& p, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + 4 <= end; n += 4) {
    int64_t t = 0;
    for (; t + 3 <= p.tokens; t += 3) tile<4, 3, 1>(p, n, t);
    for (; t + 2 <= p.tokens; t += 2) tile<4, 2, 1>(p, n, t);
    for (; t < p.tokens; t++) tile<4, 1, 2>(p, n, t);
  }
  for (; n < end; n++)
    for (int64_t t = 0; t < p.tokens; t++) tile<1, 1, 4>(p, n, t);
}

#endif  // X86

}  // namespace

// weight [rows, columns], inputs [tokens, columns], out [tokens, rows], bias [rows] or null, all bfloat16.
extern "C" void sparse24_dense_bf16(const bf16* weight, const bf16* inputs, const bf16* bias, bf16* out, int64_t rows,
                                    int64_t columns, int64_t tokens, int threads, int level) {
  const std::vector<float> wide = widened(inputs, tokens * columns);
  const Dense problem{weight, wide.data(), columns, tokens, {out, bias, rows}};
#if X86
  if (level >= kAvx2) return multiply(problem, threads, rows_avx2);
#endif
  multiply(problem, threads, rows_plain);
}
