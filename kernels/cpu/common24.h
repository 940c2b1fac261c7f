// What the CPU kernels share: number formats, where a sum goes, spreading of kept values, threads. Format: pack.py.
//
// One build serves every x86-64: the paths carry target attributes and the level is found at run time; other machines
// take the plain loops. Sums are float32; bfloat16 results are rounded to nearest even.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,f16c")))
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,avx2,fma,f16c")))
#define AMX                                                                                              \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2," \
                        "avx2,fma,f16c")))
#else
#define X86 0
#endif

// Set for the threads of a program (program.cpp): they enter every function together and share its rows.
inline thread_local bool in_team = false;

namespace {

enum Level { kPlain = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
constexpr int64_t kTiledTokens = 16;  // from so many on AMX tiles are taken

using bf16 = uint16_t;

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
  uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline void store(float value, float* out) { *out = value; }
inline void store(float value, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  *out = nan ? bf16(bits >> 16 | 0x40) : bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
std::vector<float> widened(const T* values, int64_t count) {
  std::vector<float> wide(count);
  for (int64_t i = 0; i < count; i++) wide[i] = to_float(values[i]);
  return wide;
}

// Where the sum of row n and token t goes: out[t, n], with a bias. A gated product, silu(gate) * up, comes in two
// passes over the rows first..first + span: the gate's sums are kept, then they multiply those of `up`.
template <class T>
struct Output {
  T* out;
  const T* bias;  // or null
  int64_t rows;
  float* gate = nullptr;  // [tokens, span] or null
  int64_t first = 0, span = 0;
  bool keep = false;

  void put(int64_t n, int64_t t, float sum) const {
    if (gate) {
      float& kept = gate[t * span + n - first];
      if (keep) {
        kept = sum;
        return;
      }
      sum *= kept / (1 + std::exp(-kept));
    }
    store(bias ? sum + to_float(bias[n]) : sum, out + t * rows + n);
  }
};

// body(begin, end) for all rows, `step` at a time, by as many threads; or by those of the program that it is called in.
template <class Body>
void in_steps(int64_t rows, int64_t step, int threads, Body body) {
  if (in_team) {
#pragma omp for schedule(dynamic) nowait
    for (int64_t begin = 0; begin < rows; begin += step) body(begin, std::min(begin + step, rows));
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t begin = 0; begin < rows; begin += step) body(begin, std::min(begin + step, rows));
}

template <class Body>
void in_parallel(int64_t rows, int threads, Body body) {
  // A thread that others slow down takes fewer pieces; of a small weight as many would leave each a short stream. In a
  // program all wait for the last one.
  const int64_t pieces = threads > 1 ? (in_team ? 8 : rows < 4096 ? 2 : 4) * threads : 1;
  in_steps(rows, std::max<int64_t>(8, (rows / pieces + 7) / 8 * 8), threads, body);
}

// `rows` (problem, begin, end) over all rows of a problem, whose member `to` is an Output.
template <class P>
void multiply(const P& p, int threads, void (*rows)(const P&, int64_t, int64_t)) {
  in_parallel(p.to.rows, threads, [&](int64_t begin, int64_t end) { rows(p, begin, end); });
}
template <class P>
void multiply_gated(const P& gate, const P& up, int threads, void (*rows)(const P&, int64_t, int64_t)) {
  in_parallel(up.to.rows, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> kept(up.tokens * (end - begin));
    for (bool keep : {true, false}) {
      P pass = keep ? gate : up;
      pass.to.gate = kept.data(), pass.to.first = begin, pass.to.span = end - begin, pass.to.keep = keep;
      rows(pass, begin, end);
    }
  });
}

#if X86

AVX2 inline float sum_lanes(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The four sums over all lanes of a, b, c, d.
AVX2 inline __m128 sum_four(__m256 a, __m256 b, __m256 c, __m256 d) {
  __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
}
AVX512 inline __m128 sum_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512 four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  __m128 upper = _mm_add_ps(_mm512_extractf32x4_ps(four, 2), _mm512_extractf32x4_ps(four, 3));
  return _mm_add_ps(_mm_add_ps(_mm512_castps512_ps128(four), _mm512_extractf32x4_ps(four, 1)), upper);
}

// Eight float32 as bfloat16.
AVX2 inline __m128i round_eight(const float* sums) {
  const __m256 floats = _mm256_loadu_ps(sums);
  const __m256i bits = _mm256_castps_si256(floats), upper = _mm256_srli_epi32(bits, 16);
  __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  __m256i even = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(floats, floats, _CMP_UNORD_Q));
  __m256i rounded = _mm256_blendv_epi8(even, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

// Sixteen places among 32 inputs, by VPERMT2PS: two for each group, from its nibble. `word` by reference: a broadcast
// from memory costs no shuffle.
AVX512 inline __m512i places_of(const uint32_t& word) {
  const __m512i field = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i group = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  const __m512i fields = _mm512_srlv_epi32(_mm512_set1_epi32(word), field);
  return _mm512_ternarylogic_epi32(fields, _mm512_set1_epi32(3), group, 0xea);  // fields & 3 | group
}

// Nibble -> bit offsets, byte by byte, that pick two 16-bit values (bits 0..31 of a lane) into two of four places; the
// upper half of the lane is zero, so offset 32 gives zero.
struct Offsets {
  alignas(64) uint64_t of_nibble[16];
  Offsets() {
    for (int nibble = 0; nibble < 16; nibble++) {
      uint8_t bytes[8];
      std::memset(bytes, 32, 8);
      int i0 = nibble & 3, i1 = nibble >> 2;
      bytes[2 * i0] = 0, bytes[2 * i0 + 1] = 8;
      bytes[2 * i1] = 16, bytes[2 * i1 + 1] = 24;
      std::memcpy(&of_nibble[nibble], bytes, 8);
    }
  }
};
const Offsets kOffsets;

AVX512_BF16 inline __m256i load_16(const bf16* values) { return _mm256_loadu_si256((const __m256i*)values); }

// 32 dense 16-bit values from 16 kept ones: each 64-bit lane holds a group's pair, then spreads it.
AVX512_BF16 inline __m512i spread(__m256i kept, const uint32_t& word) {
  const __m512i low = _mm512_load_si512(kOffsets.of_nibble), high = _mm512_load_si512(kOffsets.of_nibble + 8);
  const __m512i nibble_of_lane = _mm512_setr_epi64(0, 4, 8, 12, 16, 20, 24, 28);
  __m512i nibbles = _mm512_srlv_epi64(_mm512_set1_epi32(word), nibble_of_lane);  // VPERMT2Q reads four bits of a lane
  return _mm512_multishift_epi64_epi8(_mm512_permutex2var_epi64(low, nibbles, high), _mm512_cvtepu32_epi64(kept));
}

// Nibble in two's complement -> its value.
struct Values {
  alignas(64) float of_nibble[16];
  alignas(32) bf16 rounded[16];
  Values() {
    for (int nibble = 0; nibble < 16; nibble++) {
      of_nibble[nibble] = float(nibble < 8 ? nibble : nibble - 16);
      store(of_nibble[nibble], &rounded[nibble]);
    }
  }
};
const Values kValues;

// Sixteen nibbles, the lowest first, as bfloat16.
AVX512_BF16 inline __m256i widen_nibbles(uint64_t nibbles) {
  // the low byte of place i starts at bit 4 i; VPERMW reads four bits of a place
  const __m256i starts = _mm256_setr_epi64x(0x000c000800040000, 0x001c001800140010, 0x002c002800240020,
                                            0x003c003800340030);
  __m256i places = _mm256_multishift_epi64_epi8(starts, _mm256_set1_epi64x(int64_t(nibbles)));
  return _mm256_permutexvar_epi16(places, _mm256_load_si256((const __m256i*)kValues.rounded));
}

#endif  // X86

}  // namespace
