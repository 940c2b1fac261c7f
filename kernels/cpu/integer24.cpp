// Products with a packed 2:4 weight whose kept values are int8 or int4 with group scales (quantized.py), AVX-512 only:
//
//     out[t, n] = sum over scale groups s of scales[n, s] * (sum_{k in s} q[n, k] * inputs[t, k]) + bias[n]
//
// Format: words [rows, columns / 2 * bits / 32], scales [rows, ceil(columns / group)] float16, meta as in pack.py.
// The integers become bfloat16 exactly (8 bits by conversion, 4 bits by a table of sixteen), are spread like any kept
// values and multiplied; the scale is applied to the float32 sum of its group. Inputs and results are bfloat16.

#include "common24.h"

#if X86
namespace {

struct Integers {
  const uint8_t* words;
  const uint16_t* scales;
  const uint32_t* meta;
  const bf16* inputs;
  int64_t columns, tokens, group;
  Output<bf16> to;
};

// Nibble in two's complement -> bfloat16.
struct Values {
  alignas(32) bf16 of_nibble[16];
  Values() {
    for (int nibble = 0; nibble < 16; nibble++) store(float(nibble < 8 ? nibble : nibble - 16), &of_nibble[nibble]);
  }
};
const Values kValues;

// Sixteen kept integers at `at` as bfloat16.
template <int BITS>
AVX512 inline __m256i widen(const uint8_t* at) {
  if (BITS == 8) {
    __m512i integers = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at));
    return (__m256i)_mm512_cvtneps_pbh(_mm512_cvtepi32_ps(integers));
  }
  int64_t nibbles;
  std::memcpy(&nibbles, at, 8);
  // the low byte of place i starts at bit 4 i; VPERMW reads four bits of a place
  const __m256i starts = _mm256_setr_epi64x(0x000c000800040000, 0x001c001800140010, 0x002c002800240020,
                                            0x003c003800340030);
  __m256i places = _mm256_multishift_epi64_epi8(starts, _mm256_set1_epi64x(nibbles));
  return _mm256_permutexvar_epi16(places, _mm256_load_si256((const __m256i*)kValues.of_nibble));
}

template <int BITS, int TOKENS>
AVX512 void row(const Integers& p, int64_t n, int64_t first) {
  const int64_t words = p.columns / 32, span = p.group / 32, groups = (words + span - 1) / span;
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
AVX512 void rows_integer(const Integers& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n++) {
    int64_t t = 0;
    for (; t + 4 <= p.tokens; t += 4) row<BITS, 4>(p, n, t);
    for (; t < p.tokens; t++) row<BITS, 1>(p, n, t);
  }
}

}  // namespace
#endif  // X86

extern "C" {

// bits is 8 or 4, group a multiple of 32; only where sparse24_level() is 2. bias [rows] or null.
void sparse24_integer_bf16(const uint8_t* words, const uint16_t* scales, const uint32_t* meta, const bf16* inputs,
                           const bf16* bias, bf16* out, int64_t rows, int64_t columns, int64_t tokens, int64_t group,
                           int bits, int threads) {
#if X86
  Integers p{words, scales, meta, inputs, columns, tokens, group, {out, bias, rows}};
  multiply(p, threads, bits == 8 ? rows_integer<8> : rows_integer<4>);
#endif
}

}  // extern "C"
