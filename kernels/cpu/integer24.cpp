// Products with a packed 2:4 weight whose kept values are int8 or int4 with group scales (quantized.py), AVX2 and
// AVX-512:
//
//     out[t, n] = sum over scale groups s of scales[n, s] * (sum_{k in s} q[n, k] * inputs[t, k]) + bias[n]
//
// Format: words [rows, columns / 2 * bits / 32], scales [rows, ceil(columns / group)] float16, meta as in pack.py.
// The integers become bfloat16, or float32 where there are no bfloat16 products (8 bits by conversion, 4 bits by a table
// of sixteen, exactly). Then they are multiplied like any kept values (matmul24.cpp). AVX2: inputs become integers of 16
// bits, and the metadata picks those that the kept integers take. The scale is applied to the sum of its group. Inputs
// and results are bfloat16.

#include "common24.h"

#if X86
namespace {

// X: type of the inputs, float where the path computes in float, int16_t with scales of their own (Steps).
template <class X>
struct Integers {
  const uint8_t* words;
  const uint16_t* scales;
  const uint32_t* meta;
  const X* inputs;
  int64_t columns, tokens, group;
  Output<bf16> to;
  const float* input_scales = nullptr;  // [tokens, spans]
  int64_t spans = 0;

  int64_t count() const { return columns / 32; }  // words of a row
  int64_t span() const { return group / 32; }     // and of a group
  int64_t groups() const { return (count() + span() - 1) / span(); }
};

// Rows four at a time, and of those some tokens, in tiles whose sums stay in registers.
template <class Tiles>
void rows_tiled(const typename Tiles::Problem& p, int64_t begin, int64_t end) {
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

// Inputs as integers of 16 bits, so that products are exact sums of 32 bits:
//
//     inputs[t, k] = steps[t, k] * scales[t, i]    for the columns k of span i
//
// The error of an input is about 2^-16 of the largest one in its span, at most. A span below 4e-34 is zero, one with
// infinity or NaN is NaN.
struct Steps {
  static constexpr int64_t kWords = 4;  // of a span, which ends where a scale group does: sums stay below 2^31
  std::vector<int16_t> steps;           // [tokens, columns], of 32: 0 to 7, 16 to 23, 8 to 15, 24 to 31
  std::vector<float> scales;            // [tokens, spans]

  AVX2 Steps(const bf16* inputs, int64_t tokens, int64_t columns, int64_t group) : steps(tokens * columns) {
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t begin = 0; begin < columns; begin += group)
        for (int64_t at = begin, end = std::min(begin + group, columns); at < end; at += 32 * kWords)
          add(inputs + t * columns + at, std::min(32 * kWords, end - at), steps.data() + t * columns + at);
  }

  AVX2 void add(const bf16* inputs, int64_t count, int16_t* to) {
    __m256i most = _mm256_setzero_si256();  // sizes of bfloat16 are in the order of their bits, NaN above infinity
    for (int64_t k = 0; k < count; k += 16) {
      __m256i bits = _mm256_loadu_si256((const __m256i*)(inputs + k));
      most = _mm256_max_epi16(most, _mm256_and_si256(bits, _mm256_set1_epi16(0x7fff)));
    }
    alignas(32) bf16 sizes[16];
    _mm256_store_si256((__m256i*)sizes, most);
    const float largest = to_float(*std::max_element(sizes, sizes + 16)), scale = largest / 32767;
    const bool whole = std::isfinite(largest), counts = whole && std::isnormal(scale);
    scales.push_back(counts ? scale : whole ? 0 : NAN);
    if (!counts) return;
    const __m256 inverse = _mm256_set1_ps(32767 / largest);
    for (int64_t k = 0; k < count; k += 32)
      for (int half = 0; half < 32; half += 16, to += 16) {
        const bf16* x = inputs + k + half / 2;
        __m256i packed = _mm256_packs_epi32(eight(x, inverse), eight(x + 16, inverse));
        _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(packed, 0xd8));
      }
  }

  AVX2 static __m256i eight(const bf16* inputs, __m256 inverse) {
    __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)inputs)), 16);
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(bits), inverse));
  }
};

template <int BITS>
struct OnAvx2 {
  using Problem = Integers<int16_t>;
  static constexpr int kTokens = 4;

  // Sixteen kept integers at `at`. A nibble goes to the top of its 16 bits first.
  AVX2 static __m256i widen(const uint8_t* at) {
    if (BITS == 8) return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at));
    int64_t nibbles;
    std::memcpy(&nibbles, at, 8);
    const __m256i byte_of = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3,  //
                                             -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
    const __m256i shifts = _mm256_set1_epi32(0x00010010);  // as factors, 2^4 and 2^0
    __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi64x(nibbles), byte_of);
    return _mm256_srai_epi16(_mm256_mullo_epi16(bytes, shifts), 12);
  }

  // Where the inputs of sixteen kept integers are, in bytes: of the first four among columns 0 to 7, of the next among 8
  // to 15, and so on.
  AVX2 static __m256i places_of(uint32_t word) {
    const __m256i byte_of = _mm256_setr_epi8(-1, 0, -1, 0, -1, 0, -1, 0, -1, 1, -1, 1, -1, 1, -1, 1,  //
                                             -1, 2, -1, 2, -1, 2, -1, 2, -1, 3, -1, 3, -1, 3, -1, 3);
    const __m256i shifts = _mm256_set1_epi64x(0x0001000400100040);  // as factors: a field of two bits goes to the top
    const __m256i groups = _mm256_set1_epi64x(0x0908090801000100);  // both bytes of columns 0, 0, 4 and 4
    __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(int32_t(word)), byte_of);
    __m256i fields = _mm256_srli_epi16(_mm256_mullo_epi16(bytes, shifts), 14);
    return _mm256_add_epi16(_mm256_mullo_epi16(fields, _mm256_set1_epi16(0x0202)), groups);
  }

  // The inputs at these places, of 32 in the order of Steps.
  AVX2 static __m256i pick(const int16_t* inputs, __m256i places) {
    __m256i even = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)inputs), places);
    __m256i odd = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)(inputs + 16)), places);
    return _mm256_blend_epi32(even, odd, 0xcc);
  }

  template <int ROWS, int TOKENS>
  AVX2 static void tile(const Problem& p, int64_t n, int64_t first) {
    const int64_t words = p.count(), span = p.span(), groups = p.groups();
    const int64_t bytes = 2 * BITS;  // of sixteen kept integers
    const uint8_t* q = p.words + n * words * bytes;
    const uint32_t* meta = p.meta + n * words;
    const float* input_scale = p.input_scales + first * p.spans;
    const int64_t ahead = std::max<int64_t>(words, 128);  // the next tile, or a later one
    __m256 sums[ROWS][TOKENS];
    for (auto& row : sums)
      for (auto& sum : row) sum = _mm256_setzero_ps();
    for (int64_t s = 0; s < groups; s++) {
      const int64_t stop = std::min((s + 1) * span, words);
      for (int64_t w = s * span; w < stop; input_scale++) {
        __m256i partial[ROWS][TOKENS];
        for (auto& row : partial)
          for (auto& sum : row) sum = _mm256_setzero_si256();
        for (const int64_t end = std::min(w + Steps::kWords, stop); w < end; w++) {
          _mm_prefetch((const char*)(q + ROWS * (ahead + w) * bytes), _MM_HINT_T1);
          if (w % 4 == 0) _mm_prefetch((const char*)(meta + ROWS * (ahead + w)), _MM_HINT_T1);
          for (int r = 0; r < ROWS; r++) {
            const int64_t at = r * words + w;
            const __m256i kept = widen(q + at * bytes), places = places_of(meta[at]);
            for (int t = 0; t < TOKENS; t++) {
              __m256i inputs = pick(p.inputs + (first + t) * p.columns + 32 * w, places);
              partial[r][t] = _mm256_add_epi32(partial[r][t], _mm256_madd_epi16(kept, inputs));
            }
          }
        }
        for (int r = 0; r < ROWS; r++)
          for (int t = 0; t < TOKENS; t++) {
            __m256 scale = _mm256_set1_ps(_cvtsh_ss(p.scales[(n + r) * groups + s]) * input_scale[t * p.spans]);
            sums[r][t] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(partial[r][t]), sums[r][t]);
          }
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
  using Problem = Integers<float>;
  static constexpr int kTokens = 4;

  template <int ROWS, int TOKENS>
  AVX512 static void tile(const Problem& p, int64_t n, int64_t first) {
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
  if (level >= kAvx512) {
    const std::vector<float> wide = widened(inputs, tokens * columns);
    Integers<float> p{words, scales, meta, wide.data(), columns, tokens, group, to};
    return multiply(p, threads, bits == 8 ? rows_tiled<OnAvx512<8>> : rows_tiled<OnAvx512<4>>);
  }
  const Steps steps(inputs, tokens, columns, group);
  const int64_t spans = int64_t(steps.scales.size()) / tokens;
  Integers<int16_t> p{words, scales, meta, steps.steps.data(), columns, tokens, group, to, steps.scales.data(), spans};
  multiply(p, threads, bits == 8 ? rows_tiled<OnAvx2<8>> : rows_tiled<OnAvx2<4>>);
#endif
}

}  // extern "C"
