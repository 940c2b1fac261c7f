// Products with a packed weight of any pattern on a CPU (format: bitmask.py, bitmask_integers.py):
//
//     out[t, n] = sum over scale groups s of scales[n, s] * (sum_{k in s} value[n, k] * inputs[t, k]) + bias[n]
//
// and two at once, silu(gate) * up; and the dense weight itself. Without integers there is one group, and no scale.
// `columns` is the padded number, a multiple of 32; rows of `inputs` have that length too. After the last kept value
// come 32 more, so whole registers may be read.
//
// Each instruction set spreads kept values to their columns its own way. AVX2: a byte of the mask picks the shuffle that
// takes up to eight values to eight columns. AVX-512: VEXPANDPS, sixteen columns. AVX-512 with VBMI2 and bfloat16
// products: VPEXPANDW, 32 columns. A row's position in the values moves on by the bits that were set, so rows are taken
// four at a time: their chains do not wait for each other.

#include "common24.h"

namespace {

// Kinds of stored values.
struct Bf16 {
  static constexpr int kBits = 16;
  static constexpr bool kScaled = false;
};
struct F16 : Bf16 {};
struct F32 {
  static constexpr int kBits = 32;
  static constexpr bool kScaled = false;
};
struct Int8 {
  static constexpr int kBits = 8;
  static constexpr bool kScaled = true;
};
struct Int4 {
  static constexpr int kBits = 4;
  static constexpr bool kScaled = true;
};

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  const float size = rest < 0x400 ? float(rest) * 0x1p-24f : 0;
  uint32_t bits = (rest << 13) + (rest < 0x7c00 ? 112u << 23 : 224u << 23);
  if (rest < 0x400) std::memcpy(&bits, &size, 4);
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// K: kind of the values. X: type of the inputs, float where a path computes in float. T: of bias and out.
template <class K, class X, class T>
struct Masked {
  const void* values;
  const uint32_t* mask;
  const int64_t* offsets;
  const uint16_t* scales;  // float16, or null
  const X* inputs;
  int64_t columns, tokens, group;
  Output<T> to;

  int64_t words() const { return columns / 32; }
  int64_t span() const { return K::kScaled ? group / 32 : words(); }  // words of a group
  int64_t groups() const { return (words() + span() - 1) / std::max<int64_t>(1, span()); }
  float scale(int64_t n, int64_t s) const { return half_to_float(scales[n * groups() + s]); }
};

inline float value(Bf16, const void* values, int64_t at) { return to_float(((const bf16*)values)[at]); }
inline float value(F16, const void* values, int64_t at) { return half_to_float(((const uint16_t*)values)[at]); }
inline float value(F32, const void* values, int64_t at) { return ((const float*)values)[at]; }
inline float value(Int8, const void* values, int64_t at) { return ((const int8_t*)values)[at]; }
inline float value(Int4, const void* values, int64_t at) {
  const uint8_t both = ((const uint8_t*)values)[at / 2];
  return float(int8_t(at % 2 ? both : both << 4) >> 4);
}

// From number `at` on sixteen nibbles, of which as many are read.
inline uint64_t nibbles(const void* values, int64_t at) {
  const uint8_t* bytes = (const uint8_t*)values + at / 2;
  uint64_t low;
  std::memcpy(&low, bytes, 8);
  const int shift = 4 * int(at & 1);
  return low >> shift | uint64_t(bytes[8]) << 1 << (63 - shift);
}

// ---------------------------------------------------------------- plain

template <class K, class X, class T>
void rows_plain(const Masked<K, X, T>& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n++)
    for (int64_t t = 0; t < p.tokens; t++) {
      float total = 0;
      int64_t at = p.offsets[n];
      for (int64_t s = 0; s < p.groups(); s++) {
        float sum = 0;
        for (int64_t k = 32 * s * p.span(); k < std::min(32 * (s + 1) * p.span(), p.columns); k++) {
          if (p.mask[n * p.words() + k / 32] >> k % 32 & 1) {
            sum += value(K{}, p.values, at++) * to_float(p.inputs[t * p.columns + k]);
          }
        }
        total += K::kScaled ? p.scale(n, s) * sum : sum;
      }
      p.to.put(n, t, total);
    }
}

template <class K, class T>
void unpack_plain(const Masked<K, T, T>& p, T* dense, int64_t real, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n++) {
    int64_t at = p.offsets[n];
    for (int64_t k = 0; k < real; k++) {
      const bool kept = p.mask[n * p.words() + k / 32] >> k % 32 & 1;
      T* to = dense + n * real + k;
      if constexpr (K::kScaled) {
        store(kept ? value(K{}, p.values, at++) * p.scale(n, k / 32 / p.span()) : 0, to);
      } else {
        *to = kept ? ((const T*)p.values)[at++] : T(0);
      }
    }
  }
}

#if X86

// ---------------------------------------------------------------- AVX2

// Byte of the mask -> how up to eight kept values go to eight columns.
struct Spreads {
  alignas(64) uint8_t widened[256][32];  // 16 bits to the upper halves of 32: byte of each byte, 0x80 for a zero
  alignas(64) int32_t lanes[256][8];     // 32 bits: lane of each column, negative for a zero
  alignas(64) int32_t shifts[256][8];    // nibbles to the tops of 32 bits: by so many to the left, 32 for a zero
  alignas(64) uint8_t halves[256][16];   // 16 bits
  alignas(64) uint8_t bytes[256][8];
  Spreads() {
    std::memset(this, 0x80, sizeof *this);
    for (int byte = 0; byte < 256; byte++) {
      for (int column = 0, k = 0; column < 8; column++) {
        shifts[byte][column] = 32;
        if (byte >> column & 1) {
          for (int part = 0; part < 2; part++) {
            widened[byte][4 * column + 2 + part] = halves[byte][2 * column + part] = uint8_t(2 * k + part);
          }
          lanes[byte][column] = k, bytes[byte][column] = uint8_t(k), shifts[byte][column] = 28 - 4 * k;
          k++;
        }
      }
    }
  }
};
const Spreads kSpreads;

#define TARGET AVX2
namespace with_avx2 {

using Sums = __m256;
using Weights = __m256;
using Part = uint8_t;
constexpr int kTokens = 3, kFewTokens = 2, kSteps = 2;
constexpr int64_t kManyTokens = 6;

TARGET inline __m256 zero() { return _mm256_setzero_ps(); }
TARGET inline __m256 load(const float* inputs) { return _mm256_loadu_ps(inputs); }
TARGET inline __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
TARGET inline __m256 fused(__m256 weight, __m256 inputs, __m256 sum) { return _mm256_fmadd_ps(weight, inputs, sum); }
TARGET inline __m256 scaled(float scale, __m256 sum, __m256 total) {
  return _mm256_fmadd_ps(_mm256_set1_ps(scale), sum, total);
}
TARGET inline __m256 multiply_add(const float* weight, const float* inputs, __m256 sum) {
  return _mm256_fmadd_ps(_mm256_load_ps(weight), _mm256_loadu_ps(inputs), sum);
}
TARGET inline float sum_lanes(__m256 sum) { return ::sum_lanes(sum); }
TARGET inline __m128 sum_lanes(__m256 a, __m256 b, __m256 c, __m256 d) { return sum_four(a, b, c, d); }
TARGET inline void store_eight(const float* sums, float* out) { _mm256_storeu_ps(out, _mm256_loadu_ps(sums)); }
TARGET inline void store_eight(const float* sums, bf16* out) { _mm_storeu_si128((__m128i*)out, round_eight(sums)); }

TARGET inline __m256 expand(Bf16, const void* values, int64_t at, Part part) {
  __m128i eight = _mm_loadu_si128((const __m128i*)((const bf16*)values + at));
  __m256i places = _mm256_load_si256((const __m256i*)kSpreads.widened[part]);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(eight), places));
}
TARGET inline __m256 expand(F32, const void* values, int64_t at, Part part) {
  __m256i lanes = _mm256_load_si256((const __m256i*)kSpreads.lanes[part]);
  __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps((const float*)values + at), lanes);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lanes, 31)), spread);
}
TARGET inline __m256 expand(Int8, const void* values, int64_t at, Part part) {
  __m128i eight = _mm_loadl_epi64((const __m128i*)((const uint8_t*)values + at));
  __m128i spread = _mm_shuffle_epi8(eight, _mm_loadl_epi64((const __m128i*)kSpreads.bytes[part]));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(spread));
}
TARGET inline __m256 expand(Int4, const void* values, int64_t at, Part part) {
  uint64_t some;
  std::memcpy(&some, (const uint8_t*)values + at / 2, 8);
  __m256i eight = _mm256_set1_epi32(int(some >> 4 * (at & 1)));
  __m256i tops = _mm256_sllv_epi32(eight, _mm256_load_si256((const __m256i*)kSpreads.shifts[part]));
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(tops, 28));
}
TARGET inline __m256 times(__m256 weights, float scale) { return _mm256_mul_ps(weights, _mm256_set1_ps(scale)); }
TARGET inline void put(__m256 weights, float* out) { _mm256_storeu_ps(out, weights); }
TARGET inline void put(__m256 weights, bf16* out) {
  float floats[8];
  _mm256_storeu_ps(floats, weights);
  _mm_storeu_si128((__m128i*)out, round_eight(floats));
}

#include "masked_products.h"

// 16- and 32-bit values as they are, every bit.
TARGET void unpack_bits(const Masked<Bf16, bf16, bf16>& p, bf16* dense, int64_t real, int64_t begin, int64_t end) {
  std::vector<bf16> whole(p.columns);
  for (int64_t n = begin; n < end; n++) {
    const bf16* at = (const bf16*)p.values + p.offsets[n];
    for (int64_t b = 0; b < p.columns / 8; b++) {
      const uint8_t part = ((const uint8_t*)(p.mask + n * p.words()))[b];
      __m128i places = _mm_load_si128((const __m128i*)kSpreads.halves[part]);
      __m128i spread = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)at), places);
      _mm_storeu_si128((__m128i*)(whole.data() + 8 * b), spread);
      at += __builtin_popcount(part);
    }
    std::copy(whole.begin(), whole.begin() + real, dense + n * real);
  }
}

}  // namespace with_avx2
#undef TARGET

// ---------------------------------------------------------------- AVX-512

#define TARGET AVX512
namespace with_avx512 {

using Sums = __m512;
using Weights = __m512;
using Part = uint16_t;
constexpr int kTokens = 6, kFewTokens = 4, kSteps = 2;
constexpr int64_t kManyTokens = 16;

TARGET inline __m512 zero() { return _mm512_setzero_ps(); }
TARGET inline __m512 load(const float* inputs) { return _mm512_loadu_ps(inputs); }
TARGET inline __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
TARGET inline __m512 fused(__m512 weight, __m512 inputs, __m512 sum) { return _mm512_fmadd_ps(weight, inputs, sum); }
TARGET inline __m512 scaled(float scale, __m512 sum, __m512 total) {
  return _mm512_fmadd_ps(_mm512_set1_ps(scale), sum, total);
}
TARGET inline __m512 multiply_add(const float* weight, const float* inputs, __m512 sum) {
  return _mm512_fmadd_ps(_mm512_load_ps(weight), _mm512_loadu_ps(inputs), sum);
}
TARGET inline float sum_lanes(__m512 sum) { return _mm512_reduce_add_ps(sum); }
TARGET inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) { return sum_four(a, b, c, d); }
TARGET inline void store_eight(const float* sums, float* out) { _mm256_storeu_ps(out, _mm256_loadu_ps(sums)); }
TARGET inline void store_eight(const float* sums, bf16* out) { _mm_storeu_si128((__m128i*)out, round_eight(sums)); }

TARGET inline __m512 expand(Bf16, const void* values, int64_t at, Part part) {
  __m256i some = _mm256_loadu_si256((const __m256i*)((const bf16*)values + at));
  __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16);
  return _mm512_castsi512_ps(_mm512_maskz_expand_epi32(part, wide));
}
TARGET inline __m512 expand(F32, const void* values, int64_t at, Part part) {
  return _mm512_maskz_expand_ps(part, _mm512_loadu_ps((const float*)values + at));
}
TARGET inline __m512 expand(Int8, const void* values, int64_t at, Part part) {
  __m512i some = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)((const uint8_t*)values + at)));
  return _mm512_cvtepi32_ps(_mm512_maskz_expand_epi32(part, some));
}
TARGET inline __m512 expand(Int4, const void* values, int64_t at, Part part) {
  const __m512i left = _mm512_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
  const uint64_t some = nibbles(values, at);
  __m512i halves = _mm512_mask_set1_epi32(_mm512_set1_epi32(int(some)), 0xff00, int(some >> 32));
  __m512i wide = _mm512_srai_epi32(_mm512_sllv_epi32(halves, left), 28);
  return _mm512_cvtepi32_ps(_mm512_maskz_expand_epi32(part, wide));
}
TARGET inline __m512 times(__m512 weights, float scale) { return _mm512_mul_ps(weights, _mm512_set1_ps(scale)); }
TARGET inline void put(__m512 weights, float* out) { _mm512_storeu_ps(out, weights); }
TARGET inline void put(__m512 weights, bf16* out) {
  float floats[16];
  _mm512_storeu_ps(floats, weights);
  for (int half = 0; half < 16; half += 8) _mm_storeu_si128((__m128i*)(out + half), round_eight(floats + half));
}

#include "masked_products.h"

}  // namespace with_avx512
#undef TARGET

// ---------------------------------------------------------------- AVX-512 with VBMI2 and bfloat16 products

#define TARGET AVX512_BF16
namespace with_bf16 {

using Sums = __m512;
using Weights = __m512i;
using Part = uint32_t;
constexpr int kTokens = 6, kFewTokens = 4, kSteps = 1;
constexpr int64_t kManyTokens = 9;

TARGET inline __m512 zero() { return _mm512_setzero_ps(); }
TARGET inline __m512i load(const bf16* inputs) { return _mm512_loadu_si512(inputs); }
TARGET inline __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
TARGET inline __m512 fused(__m512i weight, __m512i inputs, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)inputs);
}
TARGET inline __m512 scaled(float scale, __m512 sum, __m512 total) {
  return _mm512_fmadd_ps(_mm512_set1_ps(scale), sum, total);
}
TARGET inline __m512 multiply_add(const bf16* weight, const bf16* inputs, __m512 sum) {
  return fused(_mm512_load_si512(weight), _mm512_loadu_si512(inputs), sum);
}
TARGET inline float sum_lanes(__m512 sum) { return _mm512_reduce_add_ps(sum); }
TARGET inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) { return sum_four(a, b, c, d); }
TARGET inline void store_eight(const float* sums, bf16* out) {
  _mm_storeu_si128((__m128i*)out, (__m128i)_mm256_cvtneps_pbh(_mm256_loadu_ps(sums)));
}

TARGET inline __m512i expand(Bf16, const void* values, int64_t at, Part part) {
  return _mm512_maskz_expand_epi16(part, _mm512_loadu_si512((const bf16*)values + at));
}
TARGET inline __m512i expand(Int8, const void* values, int64_t at, Part part) {
  __m256i some = _mm256_loadu_si256((const __m256i*)((const uint8_t*)values + at));
  __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(some)));
  __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(some, 1)));
  return _mm512_maskz_expand_epi16(part, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
TARGET inline __m512i expand(Int4, const void* values, int64_t at, Part part) {
  const Part low = part & 0xffff;
  __m256i first = _mm256_maskz_expand_epi16(__mmask16(low), widen_nibbles(nibbles(values, at)));
  at += __builtin_popcount(low);
  __m256i second = _mm256_maskz_expand_epi16(__mmask16(part >> 16), widen_nibbles(nibbles(values, at)));
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}
// Scaled weights are rounded to bfloat16, as the dense product has them.
TARGET inline __m512i times(__m512i weights, float scale) {
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(weights)), 16));
  __m512i upper = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(weights, 1));
  __m512 high = _mm512_castsi512_ps(_mm512_slli_epi32(upper, 16));
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factor), _mm512_mul_ps(low, factor));
}
TARGET inline void put(__m512i weights, bf16* out) { _mm512_storeu_si512(out, weights); }

#include "masked_products.h"
#include "tiles.h"

template <class K, class T>
AMX void rows_on_tiles(const Masked<K, bf16, T>& p, int64_t begin, int64_t end) {
  rows_tiled(p, begin, end, SpreadRows<K, bf16, T>{p, {}});
}

}  // namespace with_bf16
#undef TARGET
#endif  // X86

// ---------------------------------------------------------------- threads and choice of path

// A weight as it comes from Python.
struct Weight {
  const void* values;
  const uint32_t* mask;
  const int64_t* offsets;
  const uint16_t* scales;
};

template <class K, class X, class T>
Masked<K, X, T> problem(const Weight& w, const X* inputs, Output<T> to, int64_t columns, int64_t tokens, int64_t group) {
  return {w.values, w.mask, w.offsets, w.scales, inputs, columns, tokens, group, to};
}

template <class P>
void run(const P& gate, const P& up, int threads, void (*rows)(const P&, int64_t, int64_t)) {
  gate.values ? multiply_gated(gate, up, threads, rows) : multiply(up, threads, rows);
}

// One product, or with gate.values the gated one, on the path of `level`.
template <class K, class T>
void product(const Weight& gate, const Weight& up, const T* inputs, Output<T> to, int64_t columns, int64_t tokens,
             int64_t group, int threads, int level) {
#if X86
  if constexpr (std::is_same_v<T, bf16>) {
    if (level >= kAmx && tokens >= kTiledTokens) {
      const std::vector<bf16> pairs = with_bf16::in_pairs(inputs, tokens, columns);
      return run(problem<K>(gate, pairs.data(), to, columns, tokens, group),
                 problem<K>(up, pairs.data(), to, columns, tokens, group), threads, with_bf16::rows_on_tiles<K, T>);
    }
    if (level >= kAvx512Bf16) {
      auto rows = tokens < with_bf16::kManyTokens ? with_bf16::rows_few<K, bf16, T> : with_bf16::rows_many<K, bf16, T>;
      return run(problem<K>(gate, inputs, to, columns, tokens, group),
                 problem<K>(up, inputs, to, columns, tokens, group), threads, rows);
    }
  }
#endif
  const std::vector<float> wide = widened(inputs, sizeof(T) == 4 ? 0 : tokens * columns);
  const float* x = sizeof(T) == 4 ? (const float*)inputs : wide.data();
  const auto first = problem<K>(gate, x, to, columns, tokens, group);
  const auto second = problem<K>(up, x, to, columns, tokens, group);
#if X86
  if (level >= kAvx512) {
    const bool many = tokens >= with_avx512::kManyTokens;
    return run(first, second, threads, many ? with_avx512::rows_many<K, float, T> : with_avx512::rows_few<K, float, T>);
  }
  if (level >= kAvx2) {
    const bool many = tokens >= with_avx2::kManyTokens;
    return run(first, second, threads, many ? with_avx2::rows_many<K, float, T> : with_avx2::rows_few<K, float, T>);
  }
#endif
  run(first, second, threads, rows_plain<K, float, T>);
}

template <class K, class T>
void unpack(const Weight& w, T* dense, int64_t rows, int64_t padded, int64_t real, int64_t group, int threads,
            int level) {
  const auto p = problem<K, T, T>(w, nullptr, {nullptr, nullptr, rows}, padded, 0, group);
  auto some = unpack_plain<K, T>;
#if X86
  if (level >= kAvx2) {
    if constexpr (std::is_same_v<K, Bf16>) {
      some = with_avx2::unpack_bits;
    } else {
      some = with_avx2::unpack_rows<K, T>;
    }
  }
  if constexpr (std::is_same_v<K, Bf16>) {
    if (level >= kAvx512Bf16) some = with_bf16::unpack_rows<K, T>;
  } else {
    if (level >= kAvx512) some = with_avx512::unpack_rows<K, T>;
  }
#endif
  in_parallel(rows, threads, [&](int64_t begin, int64_t end) { some(p, dense, real, begin, end); });
}

}  // namespace

extern "C" {

// inputs [tokens, columns], out [tokens, rows], bias [rows] or null, all of the values' type or, with integers and
// scales, of the type in the name. With a gate's values (null without) out = silu(inputs gate^T) * (inputs weight^T).
#define PRODUCT(NAME, K, T)                                                                                           \
  void NAME(const void* gate_values, const uint32_t* gate_mask, const int64_t* gate_offsets,                          \
            const uint16_t* gate_scales, const void* values, const uint32_t* mask, const int64_t* offsets,            \
            const uint16_t* scales, const T* inputs, const T* bias, T* out, int64_t rows, int64_t columns,            \
            int64_t tokens, int64_t group, int threads, int level) {                                                  \
    product<K, T>({gate_values, gate_mask, gate_offsets, gate_scales}, {values, mask, offsets, scales}, inputs,       \
                  {out, bias, rows}, columns, tokens, group, threads, level);                                         \
  }
PRODUCT(sparse24_masked_bf16, Bf16, bf16)
PRODUCT(sparse24_masked_f32, F32, float)
PRODUCT(sparse24_masked_int8_bf16, Int8, bf16)
PRODUCT(sparse24_masked_int4_bf16, Int4, bf16)
PRODUCT(sparse24_masked_int8_f32, Int8, float)
PRODUCT(sparse24_masked_int4_f32, Int4, float)

// dense [rows, real] from a weight of `padded` columns: values of 16 or 32 bits as they are, integers times scales.
#define UNPACK(NAME, K, T)                                                                                            \
  void NAME(const void* values, const uint32_t* mask, const int64_t* offsets, const uint16_t* scales, T* dense,       \
            int64_t rows, int64_t padded, int64_t real, int64_t group, int threads, int level) {                      \
    unpack<K, T>({values, mask, offsets, scales}, dense, rows, padded, real, group, threads, level);                  \
  }
UNPACK(sparse24_expand_16, Bf16, bf16)
UNPACK(sparse24_expand_32, F32, float)
UNPACK(sparse24_expand_int8_bf16, Int8, bf16)
UNPACK(sparse24_expand_int4_bf16, Int4, bf16)
UNPACK(sparse24_expand_int8_f32, Int8, float)
UNPACK(sparse24_expand_int4_f32, Int4, float)

}  // extern "C"
