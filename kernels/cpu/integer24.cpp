// Products with a packed 2:4 weight whose kept values are int8 or int4 with group scales (quantized.py), AVX2 and
// AVX-512:
//
//     out[t, n] = sum over scale groups s of scales[n, s] * (sum_{k in s} q[n, k] * inputs[t, k]) + bias[n]
//
// Format: words [rows, columns / 2 * bits / 32], scales [rows, ceil(columns / group)] float16, meta as in pack.py.
// The integers become bfloat16, or float32 where there are no bfloat16 products (8 bits by conversion, 4 bits by a table
// of sixteen, exactly). Then they are multiplied like any kept values (matmul24.cpp). AVX2: a byte of metadata picks the
// shuffle, or for 4 bits the shifts, that take four integers to eight columns. The scale is applied to the float32 sum of
// its group. Inputs and results are bfloat16.

#include "common24.h"

#if X86
namespace {

// X: type of the inputs, float where the path computes in float.
template <class X>
struct Integers {
  const uint8_t* words;
  const uint16_t* scales;
  const uint32_t* meta;
  const X* inputs;
  int64_t columns, tokens, group;
  Output<bf16> to;

  int64_t count() const { return columns / 32; }  // words of a row
  int64_t span() const { return group / 32; }     // and of a group
  int64_t groups() const { return (count() + span() - 1) / span(); }
};

// Rows four at a time, and of those some tokens, in tiles whose sums stay in registers.
template <class Tiles>
void rows_tiled(const Integers<float>& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += 4) {
    int64_t t = 0;
    if (n + 4 <= end) {
      for (; t + Tiles::kTokens <= p.tokens; t += Tiles::kTokens) Tiles::template tile<4, Tiles::kTokens>(p, n, t);
      for (; t < p.tokens; t++) Tiles::template tile<4, 1>(p, n, t);
    }
    for (int64_t row = n; row < std::min(n + 4, end); row++)
      for (int64_t u = t; u < p.tokens; u++) Tiles::template tile<1, 1>(p, row, u);
  }
}

// ---------------------------------------------------------------- AVX2

// Byte of metadata (two groups) -> how four kept integers go to eight columns.
struct IntegerSpreads {
  alignas(64) int32_t shifts[256][8];  // nibbles to the tops of 32 bits: by so many to the left, 32 for a zero
  alignas(64) uint8_t bytes[256][8];   // byte of each column, 0x80 for a zero
  IntegerSpreads() {
    std::fill(&shifts[0][0], &shifts[0][0] + 256 * 8, 32);
    std::memset(bytes, 0x80, sizeof bytes);
    for (int byte = 0; byte < 256; byte++)
      for (int k = 0; k < 4; k++) {
        const int column = 4 * (k / 2) + (byte >> 2 * k & 3);
        shifts[byte][column] = 28 - 4 * k, bytes[byte][column] = uint8_t(k);
      }
  }
};
const IntegerSpreads kIntegerSpreads;

template <int BITS>
struct OnAvx2 {
  static constexpr int kTokens = 2;

  // Eight columns, of which the four kept integers at `at` take theirs.
  AVX2 static __m256 spread(const uint8_t* at, uint8_t byte) {
    if constexpr (BITS == 8) {
      int32_t four;
      std::memcpy(&four, at, 4);
      __m128i places = _mm_loadl_epi64((const __m128i*)kIntegerSpreads.bytes[byte]);
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(_mm_cvtsi32_si128(four), places)));
    }
    uint16_t four;
    std::memcpy(&four, at, 2);
    __m256i shifts = _mm256_load_si256((const __m256i*)kIntegerSpreads.shifts[byte]);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sllv_epi32(_mm256_set1_epi32(four), shifts), 28));
  }

  template <int ROWS, int TOKENS>
  AVX2 static void tile(const Integers<float>& p, int64_t n, int64_t first) {
    const int64_t words = p.count(), span = p.span(), groups = p.groups();
    const int64_t bytes = 2 * BITS;  // of sixteen kept integers
    const uint8_t* q = p.words + n * words * bytes;
    const uint8_t* meta = (const uint8_t*)(p.meta + n * words);
    const float* x = p.inputs + first * p.columns;
    __m256 sums[ROWS][TOKENS];
    for (auto& row : sums)
      for (auto& sum : row) sum = _mm256_setzero_ps();
    for (int64_t s = 0; s < groups; s++) {
      __m256 partial[ROWS][TOKENS];
      for (auto& row : partial)
        for (auto& sum : row) sum = _mm256_setzero_ps();
      for (int64_t w = s * span; w < std::min((s + 1) * span, words); w++) {
        _mm_prefetch((const char*)(q + ROWS * (words + w) * bytes), _MM_HINT_T1);  // of the next tile
        if (w % 4 == 0) _mm_prefetch((const char*)(meta + 4 * ROWS * (words + w)), _MM_HINT_T1);
        for (int part = 0; part < 4; part++)
          for (int r = 0; r < ROWS; r++) {
            const int64_t at = r * words + w;
            __m256 dense = spread(q + at * bytes + part * bytes / 4, meta[4 * at + part]);
            for (int t = 0; t < TOKENS; t++) {
              __m256 inputs = _mm256_loadu_ps(x + t * p.columns + 32 * w + 8 * part);
              partial[r][t] = _mm256_fmadd_ps(dense, inputs, partial[r][t]);
            }
          }
      }
      for (int r = 0; r < ROWS; r++) {
        __m256 scale = _mm256_set1_ps(_cvtsh_ss(p.scales[(n + r) * groups + s]));
        for (int t = 0; t < TOKENS; t++) sums[r][t] = _mm256_fmadd_ps(scale, partial[r][t], sums[r][t]);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int t = 0; t < TOKENS; t++) p.to.put(n + r, first + t, sum_lanes(sums[r][t]));
  }
};

// ---------------------------------------------------------------- bfloat16 products

// Sixteen kept integers at `at` as bfloat16.
template <int BITS>
AVX512_BF16 inline __m256i widen(const uint8_t* at) {
  if (BITS == 8) {
    __m512i integers = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at));
    return (__m256i)_mm512_cvtneps_pbh(_mm512_cvtepi32_ps(integers));
  }
  uint64_t nibbles;
  std::memcpy(&nibbles, at, 8);
  return widen_nibbles(nibbles);
}

template <int BITS, int TOKENS>
AVX512_BF16 void row(const Integers<bf16>& p, int64_t n, int64_t first) {
  const int64_t words = p.count(), span = p.span(), groups = p.groups();
  const int64_t bytes = 2 * BITS;  // of sixteen kept integers
  const uint8_t* q = p.words + n * words * bytes;
  const uint32_t* meta = p.meta + n * words;
  const bf16* x = p.inputs + first * p.columns;
  __m512 sums[TOKENS];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t s = 0; s < groups; s++) {
    __m512 partial[TOKENS];
    for (auto& sum : partial) sum = _mm512_setzero_ps();
    for (int64_t w = s * span; w < std::min((s + 1) * span, words); w++) {
      if (w * bytes % 64 == 0) _mm_prefetch((const char*)q + w * bytes + 4096, _MM_HINT_NTA);
      __m512i dense = spread(widen<BITS>(q + w * bytes), meta[w]);
      for (int t = 0; t < TOKENS; t++) {
        __m512i inputs = _mm512_loadu_si512(x + t * p.columns + 32 * w);
        partial[t] = _mm512_dpbf16_ps(partial[t], (__m512bh)dense, (__m512bh)inputs);
      }
    }
    __m512 scale = _mm512_set1_ps(_cvtsh_ss(p.scales[n * groups + s]));
    for (int t = 0; t < TOKENS; t++) sums[t] = _mm512_fmadd_ps(scale, partial[t], sums[t]);
  }
  for (int t = 0; t < TOKENS; t++) p.to.put(n, first + t, _mm512_reduce_add_ps(sums[t]));
}

template <int BITS>
AVX512_BF16 void rows_bf16(const Integers<bf16>& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n++) {
    int64_t t = 0;
    for (; t + 4 <= p.tokens; t += 4) row<BITS, 4>(p, n, t);
    for (; t < p.tokens; t++) row<BITS, 1>(p, n, t);
  }
}

// ---------------------------------------------------------------- in float32

// Sixteen kept integers at `at`.
template <int BITS>
AVX512 inline __m512 widen_float(const uint8_t* at) {
  if (BITS == 8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)));
  int32_t low, high;
  std::memcpy(&low, at, 4), std::memcpy(&high, at + 4, 4);
  const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  __m512i nibbles = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);  // VPERMPS reads four bits of a lane
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(nibbles, places), _mm512_load_ps(kValues.of_nibble));
}

template <int BITS>
struct OnAvx512 {
  static constexpr int kTokens = 4;

  template <int ROWS, int TOKENS>
  AVX512 static void tile(const Integers<float>& p, int64_t n, int64_t first) {
    const int64_t words = p.count(), span = p.span(), groups = p.groups();
    const int64_t bytes = 2 * BITS;  // of sixteen kept integers
    const uint8_t* q = p.words + n * words * bytes;
    const uint32_t* meta = p.meta + n * words;
    __m512 sums[ROWS][TOKENS];
    for (auto& row : sums)
      for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int64_t s = 0; s < groups; s++) {
      __m512 partial[ROWS][TOKENS];
      for (auto& row : partial)
        for (auto& sum : row) sum = _mm512_setzero_ps();
      for (int64_t w = s * span; w < std::min((s + 1) * span, words); w++) {
        _mm_prefetch((const char*)(q + ROWS * (words + w) * bytes), _MM_HINT_T1);  // of the next tile
        if (w % 4 == 0) _mm_prefetch((const char*)(meta + ROWS * (words + w)), _MM_HINT_T1);
        __m512 kept[ROWS];
        __m512i places[ROWS];
        for (int r = 0; r < ROWS; r++) {
          kept[r] = widen_float<BITS>(q + (r * words + w) * bytes);
          places[r] = places_of(meta[r * words + w]);
        }
        for (int t = 0; t < TOKENS; t++) {
          const float* x = p.inputs + (first + t) * p.columns + 32 * w;
          __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
          for (int r = 0; r < ROWS; r++) {
            __m512 inputs = _mm512_permutex2var_ps(low, places[r], high);
            partial[r][t] = _mm512_fmadd_ps(kept[r], inputs, partial[r][t]);
          }
        }
      }
      for (int r = 0; r < ROWS; r++) {
        __m512 scale = _mm512_set1_ps(_cvtsh_ss(p.scales[(n + r) * groups + s]));
        for (int t = 0; t < TOKENS; t++) sums[r][t] = _mm512_fmadd_ps(scale, partial[r][t], sums[r][t]);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int t = 0; t < TOKENS; t++) p.to.put(n + r, first + t, _mm512_reduce_add_ps(sums[r][t]));
  }
};

}  // namespace
#endif  // X86

extern "C" {

// bits is 8 or 4, group a multiple of 32, level at least kAvx2. bias [rows] or null.
void sparse24_integer_bf16(const uint8_t* words, const uint16_t* scales, const uint32_t* meta, const bf16* inputs,
                           const bf16* bias, bf16* out, int64_t rows, int64_t columns, int64_t tokens, int64_t group,
                           int bits, int threads, int level) {
#if X86
  const Output<bf16> to{out, bias, rows};
  if (level >= kAvx512Bf16) {
    Integers<bf16> p{words, scales, meta, inputs, columns, tokens, group, to};
    return multiply(p, threads, bits == 8 ? rows_bf16<8> : rows_bf16<4>);
  }
  const std::vector<float> wide = widened(inputs, tokens * columns);
  Integers<float> p{words, scales, meta, wide.data(), columns, tokens, group, to};
  if (level >= kAvx512) return multiply(p, threads, bits == 8 ? rows_tiled<OnAvx512<8>> : rows_tiled<OnAvx512<4>>);
  multiply(p, threads, bits == 8 ? rows_tiled<OnAvx2<8>> : rows_tiled<OnAvx2<4>>);
#endif
}

}  // extern "C"
