// Products with a packed 2:4 weight on a CPU:  out[t, n] = sum_k weight[n, k] * inputs[t, k] + bias[n]
//
// Format as in pack.py: values [rows, columns / 2], meta [rows, columns / 32] words of eight nibbles i0 | i1 << 2.
// `columns` is the padded number, a multiple of 32; rows of `inputs` have that length too.
//
// With few tokens the time goes into reading the weight, so 9/16 of the bytes are 9/16 of the time, if expanding the
// weight costs less than waiting for it. AVX-512 bfloat16: the eight nibbles of a word pick eight byte shuffles out of a
// table of sixteen (VPERMT2Q), one VPSHUFB places 32 weights, VDPBF16PS multiplies. AVX2: a byte of metadata picks a
// permutation of four kept values into eight places; bfloat16 is widened on the way. Tokens share each expansion.
//
// One build serves every x86-64: the paths carry target attributes and the level is found at run time; other machines
// take the plain loops. Sums are float32; bfloat16 results are rounded to nearest even.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512bf16,avx2,fma")))
#else
#define X86 0
#endif

namespace {

enum Level { kPlain = 0, kAvx2 = 1, kAvx512Bf16 = 2 };

using bf16 = uint16_t;

float to_float(float value) { return value; }
float to_float(bf16 value) {
  uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
void store(float value, float* out) { *out = value; }
void store(float value, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  *out = nan ? bf16(bits >> 16 | 0x40) : bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// T: type of values, bias and out. X: type of the inputs, float where a path computes in float.
template <class T, class X>
struct Problem {
  const T* values;
  const uint32_t* meta;
  const X* inputs;
  const T* bias;  // or null
  T* out;
  int64_t rows, columns, tokens;

  int64_t kept() const { return columns / 2; }
  int64_t words() const { return columns / 32; }
  void put(int64_t n, int64_t t, float sum) const { store(bias ? sum + to_float(bias[n]) : sum, out + t * rows + n); }
};

// ---------------------------------------------------------------- plain

template <class T>
void rows_plain(const Problem<T, float>& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n++) {
    const T* values = p.values + n * p.kept();
    const uint32_t* meta = p.meta + n * p.words();
    for (int64_t t = 0; t < p.tokens; t++) {
      const float* x = p.inputs + t * p.columns;
      float first = 0, second = 0;
      for (int64_t g = 0; g < p.columns / 4; g++) {
        uint32_t nibble = meta[g / 8] >> (4 * (g % 8));
        first += to_float(values[2 * g]) * x[4 * g + (nibble & 3)];
        second += to_float(values[2 * g + 1]) * x[4 * g + (nibble >> 2 & 3)];
      }
      p.put(n, t, first + second);
    }
  }
}

template <class T>
void unpack_plain(const T* values, const uint32_t* meta, T* dense, int64_t columns) {
  std::fill(dense, dense + columns, T(0));
  for (int64_t g = 0; g < columns / 4; g++) {
    uint32_t nibble = meta[g / 8] >> (4 * (g % 8));
    dense[4 * g + (nibble & 3)] = values[2 * g];
    dense[4 * g + (nibble >> 2 & 3)] = values[2 * g + 1];
  }
}

#if X86

// A tile is ROWS rows times TOKENS tokens; STEPS independent sums each hide the latency of the multiply-add. While it is
// computed the memory behind it is fetched: the next tile into the second-level cache; or, for one row, what comes 8 KiB
// later, and then past the caches where the inputs live.
template <int ROWS, int BYTES, class T>
inline void prefetch(const T* values, int64_t at, int64_t kept) {
  const char* ahead = ROWS == 1 ? (const char*)(values + at) + 8192 : (const char*)(values + ROWS * (kept + at));
  for (int line = 0; line < BYTES / 64; line++) {
    if (ROWS == 1) _mm_prefetch(ahead + 64 * line, _MM_HINT_NTA);
    if (ROWS != 1) _mm_prefetch(ahead + 64 * line, _MM_HINT_T1);
  }
}

// Rows in fours, and for the last token of an odd number one by one: a plain stream is read fastest.
#define ALL_TILES(TILE, WIDE)                                              \
  for (int64_t n = begin; n < end; n += 4) {                               \
    int64_t t = 0;                                                         \
    if (n + 4 <= end) {                                                    \
      for (; t + WIDE <= p.tokens; t += WIDE) TILE<4, WIDE, 4 / WIDE>(p, n, t); \
      for (; t + 2 <= p.tokens; t += 2) TILE<4, 2, 2>(p, n, t);            \
    }                                                                      \
    for (int64_t r = n; r < std::min(n + 4, end); r++)                     \
      for (int64_t u = t; u < p.tokens; u++) TILE<1, 1, 4>(p, r, u);       \
  }

// ---------------------------------------------------------------- AVX2

// Byte of metadata (two groups) -> which of four kept values each of eight columns takes; lane 4 holds a zero.
struct Permutations {
  uint64_t of_byte[256];
  Permutations() {
    for (int byte = 0; byte < 256; byte++) {
      uint8_t lanes[8];
      std::memset(lanes, 4, 8);
      lanes[byte & 3] = 0;
      lanes[byte >> 2 & 3] = 1;
      lanes[4 + (byte >> 4 & 3)] = 2;
      lanes[4 + (byte >> 6)] = 3;
      std::memcpy(&of_byte[byte], lanes, 8);
    }
  }
};
const Permutations kPermutations;

AVX2 inline __m128 load_four(const float* values) { return _mm_loadu_ps(values); }
AVX2 inline __m128 load_four(const bf16* values) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)values)), 16));
}
AVX2 inline float sum_lanes(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
template <class T>
AVX2 inline __m256 spread_eight(const T* values, uint8_t byte) {
  __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&kPermutations.of_byte[byte]));
  return _mm256_permutevar8x32_ps(_mm256_zextps128_ps256(load_four(values)), lanes);
}

template <int ROWS, int TOKENS, int STEPS, class T>
AVX2 void tile_avx2(const Problem<T, float>& p, int64_t n, int64_t first) {
  const T* values = p.values + n * p.kept();
  const uint8_t* bytes = (const uint8_t*)(p.meta + n * p.words());
  const float* x = p.inputs + first * p.columns;
  __m256 sums[ROWS][TOKENS][STEPS];
  for (auto& row : sums)
    for (auto& token : row)
      for (auto& sum : token) sum = _mm256_setzero_ps();
  for (int64_t b = 0; b < p.columns / 8; b += STEPS) {  // a padded row has a multiple of four bytes of metadata
    prefetch<ROWS, ROWS * STEPS * 4 * int(sizeof(T))>(values, 4 * b, p.kept());
    for (int step = 0; step < STEPS; step++)
      for (int r = 0; r < ROWS; r++) {
        __m256 dense = spread_eight(values + r * p.kept() + 4 * (b + step), bytes[r * p.words() * 4 + b + step]);
        for (int t = 0; t < TOKENS; t++) {
          __m256 inputs = _mm256_loadu_ps(x + t * p.columns + 8 * (b + step));
          sums[r][t][step] = _mm256_fmadd_ps(dense, inputs, sums[r][t][step]);
        }
      }
  }
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < TOKENS; t++) {
      __m256 sum = sums[r][t][0];
      for (int step = 1; step < STEPS; step++) sum = _mm256_add_ps(sum, sums[r][t][step]);
      p.put(n + r, first + t, sum_lanes(sum));
    }
}
template <class T>
AVX2 void rows_avx2(const Problem<T, float>& p, int64_t begin, int64_t end) {
  ALL_TILES(tile_avx2, 2)  // sixteen registers hold no more than eight sums beside the operands
}
AVX2 void unpack_avx2(const float* values, const uint32_t* meta, float* dense, int64_t columns) {
  const uint8_t* bytes = (const uint8_t*)meta;
  for (int64_t b = 0; b < columns / 8; b++) _mm256_storeu_ps(dense + 8 * b, spread_eight(values + 4 * b, bytes[b]));
}

// ---------------------------------------------------------------- AVX-512 with bfloat16 products

// Nibble -> bytes of a shuffle that places two 16-bit values (at bytes 0..3) among four places; 0x80 gives zero.
struct Shuffles {
  alignas(64) uint64_t of_nibble[16];
  Shuffles() {
    for (int nibble = 0; nibble < 16; nibble++) {
      uint8_t bytes[8];
      std::memset(bytes, 0x80, 8);
      int i0 = nibble & 3, i1 = nibble >> 2;
      bytes[2 * i0] = 0, bytes[2 * i0 + 1] = 1;
      bytes[2 * i1] = 2, bytes[2 * i1 + 1] = 3;
      std::memcpy(&of_nibble[nibble], bytes, 8);
    }
  }
};
const Shuffles kShuffles;

// 32 dense values from 16 kept ones: each 64-bit lane holds a group's pair, then spreads it.
AVX512 inline __m512i spread(const bf16* values, uint32_t word) {
  const __m512i low = _mm512_load_si512(kShuffles.of_nibble), high = _mm512_load_si512(kShuffles.of_nibble + 8);
  const __m512i nibble_of_lane = _mm512_setr_epi64(0, 4, 8, 12, 16, 20, 24, 28);
  const __m512i upper_half = _mm512_set_epi64(0x0808080808080808, 0, 0x0808080808080808, 0,  //
                                              0x0808080808080808, 0, 0x0808080808080808, 0);
  __m512i nibbles = _mm512_srlv_epi64(_mm512_set1_epi64(word), nibble_of_lane);  // VPERMT2Q reads four bits of a lane
  __m512i shuffle = _mm512_or_si512(_mm512_permutex2var_epi64(low, nibbles, high), upper_half);
  return _mm512_shuffle_epi8(_mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i*)values)), shuffle);
}

template <int ROWS, int TOKENS, int STEPS>
AVX512 inline void add_word(const Problem<bf16, bf16>& p, int64_t n, int64_t first, int64_t w, int step,
                            __m512 (&sums)[ROWS][TOKENS][STEPS]) {
  __m512i dense[ROWS];
  for (int r = 0; r < ROWS; r++) {
    dense[r] = spread(p.values + (n + r) * p.kept() + 16 * w, p.meta[(n + r) * p.words() + w]);
  }
  for (int t = 0; t < TOKENS; t++) {
    __m512i inputs = _mm512_loadu_si512(p.inputs + (first + t) * p.columns + 32 * w);
    for (int r = 0; r < ROWS; r++) {
      sums[r][t][step] = _mm512_dpbf16_ps(sums[r][t][step], (__m512bh)dense[r], (__m512bh)inputs);
    }
  }
}

template <int ROWS, int TOKENS, int STEPS>
AVX512 void tile_bf16(const Problem<bf16, bf16>& p, int64_t n, int64_t first) {
  __m512 sums[ROWS][TOKENS][STEPS];
  for (auto& row : sums)
    for (auto& token : row)
      for (auto& sum : token) sum = _mm512_setzero_ps();
  int64_t w = 0;
  for (; w + STEPS <= p.words(); w += STEPS) {
    prefetch<ROWS, 32 * ROWS * STEPS>(p.values + n * p.kept(), 16 * w, p.kept());
    for (int step = 0; step < STEPS; step++) add_word(p, n, first, w + step, step, sums);
  }
  for (; w < p.words(); w++) add_word(p, n, first, w, 0, sums);
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < TOKENS; t++) {
      __m512 sum = sums[r][t][0];
      for (int step = 1; step < STEPS; step++) sum = _mm512_add_ps(sum, sums[r][t][step]);
      p.put(n + r, first + t, _mm512_reduce_add_ps(sum));
    }
}
AVX512 void rows_bf16(const Problem<bf16, bf16>& p, int64_t begin, int64_t end) { ALL_TILES(tile_bf16, 4) }

AVX512 void unpack_avx512(const bf16* values, const uint32_t* meta, bf16* dense, int64_t columns) {
  for (int64_t w = 0; w < columns / 32; w++) _mm512_storeu_si512(dense + 32 * w, spread(values + 16 * w, meta[w]));
}
#endif  // X86

// ---------------------------------------------------------------- threads and choice of path

template <class Body>
void in_parallel(int64_t rows, int threads, Body body) {
  const int64_t pieces = threads > 1 ? 4 * threads : 1;  // a thread that others slow down takes fewer of them
  const int64_t step = std::max<int64_t>(4, (rows / pieces + 3) / 4 * 4);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t begin = 0; begin < rows; begin += step) body(begin, std::min(begin + step, rows));
}

template <class T, class X>
void multiply(const Problem<T, X>& p, int threads, void (*rows)(const Problem<T, X>&, int64_t, int64_t)) {
  in_parallel(p.rows, threads, [&](int64_t begin, int64_t end) { rows(p, begin, end); });
}

template <class T>
void unpack_rows(const T* values, const uint32_t* meta, T* dense, int64_t rows, int64_t padded, int64_t columns,
                 int threads, void (*unpack_row)(const T*, const uint32_t*, T*, int64_t)) {
  in_parallel(rows, threads, [&](int64_t begin, int64_t end) {
    std::vector<T> whole(columns == padded ? 0 : padded);
    for (int64_t n = begin; n < end; n++) {
      T* target = columns == padded ? dense + n * columns : whole.data();
      unpack_row(values + n * (padded / 2), meta + n * (padded / 32), target, padded);
      if (columns != padded) std::copy(whole.begin(), whole.begin() + columns, dense + n * columns);
    }
  });
}

}  // namespace

extern "C" {

// 0 plain loops, 1 AVX2, 2 AVX-512 with bfloat16 products: the best path of this machine.
int sparse24_level() {
#if X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16"))
    return kAvx512Bf16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPlain;
}

// inputs [tokens, columns], out [tokens, rows], bias [rows] or null, all bfloat16.
void sparse24_matmul_bf16(const bf16* values, const uint32_t* meta, const bf16* inputs, const bf16* bias, bf16* out,
                          int64_t rows, int64_t columns, int64_t tokens, int threads, int level) {
#if X86
  if (level >= kAvx512Bf16) {
    multiply(Problem<bf16, bf16>{values, meta, inputs, bias, out, rows, columns, tokens}, threads, rows_bf16);
    return;
  }
#endif
  std::vector<float> wide(tokens * columns);
  for (int64_t i = 0; i < tokens * columns; i++) wide[i] = to_float(inputs[i]);
  Problem<bf16, float> p{values, meta, wide.data(), bias, out, rows, columns, tokens};
#if X86
  if (level >= kAvx2) return multiply(p, threads, rows_avx2<bf16>);
#endif
  multiply(p, threads, rows_plain<bf16>);
}

// The same in float32.
void sparse24_matmul_f32(const float* values, const uint32_t* meta, const float* inputs, const float* bias, float* out,
                         int64_t rows, int64_t columns, int64_t tokens, int threads, int level) {
  Problem<float, float> p{values, meta, inputs, bias, out, rows, columns, tokens};
#if X86
  if (level >= kAvx2) return multiply(p, threads, rows_avx2<float>);
#endif
  multiply(p, threads, rows_plain<float>);
}

// dense [rows, columns] from a packed weight whose rows are padded to `padded` columns; any 16-bit type.
void sparse24_unpack_16(const uint16_t* values, const uint32_t* meta, uint16_t* dense, int64_t rows, int64_t padded,
                        int64_t columns, int threads, int level) {
#if X86
  if (level >= kAvx512Bf16)
    return unpack_rows(values, meta, dense, rows, padded, columns, threads, unpack_avx512);
#endif
  unpack_rows(values, meta, dense, rows, padded, columns, threads, unpack_plain<uint16_t>);
}

// The same for float32.
void sparse24_unpack_32(const float* values, const uint32_t* meta, float* dense, int64_t rows, int64_t padded,
                        int64_t columns, int threads, int level) {
#if X86
  if (level >= kAvx2) return unpack_rows(values, meta, dense, rows, padded, columns, threads, unpack_avx2);
#endif
  unpack_rows(values, meta, dense, rows, padded, columns, threads, unpack_plain<float>);
}

}  // extern "C"
