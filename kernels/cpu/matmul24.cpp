// Products with a packed 2:4 weight on a CPU:  out[t, n] = sum_k weight[n, k] * inputs[t, k] + bias[n],
// and two at once, silu(gate) * up.
//
// Format as in pack.py: values [rows, columns / 2], meta [rows, columns / 32] words of eight nibbles i0 | i1 << 2.
// `columns` is the padded number, a multiple of 32; rows of `inputs` have that length too.
//
// With few tokens the time goes into reading the weight, so 9/16 of the bytes are 9/16 of the time, if expanding the
// weight costs less than waiting for it. AVX-512 bfloat16: the eight nibbles of a word pick eight sets of bit offsets
// out of a table of sixteen (VPERMT2Q), one VPMULTISHIFTQB places 32 weights, VDPBF16PS multiplies. AVX-512 without such
// products, and float32: a word is sixteen fields of two bits, one for each of its kept values in turn, so with a shift
// a lane it is the index by which VPERMT2PS brings sixteen of 32 inputs to the kept values. AVX2: a byte of metadata
// picks the permutation that takes four kept values to eight places, bfloat16 to the upper halves of float32. With more
// tokens eight rows at a time are expanded into the first-level cache and multiplied from there. Paths without bfloat16
// products compute in float32: the inputs are widened once, the weights where they are expanded.

#include "common24.h"

#include <type_traits>

#if X86
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// T: type of values, bias and out. X: type of the inputs, float where a path computes in float.
template <class T, class X>
struct Problem {
  const T* values;
  const uint32_t* meta;
  const X* inputs;
  int64_t columns, tokens;
  Output<T> to;

  int64_t kept() const { return columns / 2; }
  int64_t words() const { return columns / 32; }
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
      p.to.put(n, t, first + second);
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
// computed the memory after it is fetched into the second-level cache, the next tile or what comes 4096 values later;
// or, for one row, what comes 6 KiB later, and then past the caches where the inputs live.
template <int ROWS, int BYTES, class T>
inline void prefetch(const T* values, int64_t at, int64_t kept) {
  const char* ahead = (const char*)(values + at) + 6144;
  if (ROWS != 1) ahead = (const char*)(values + std::max<int64_t>(ROWS * kept, 4096) + ROWS * at);
  for (int line = 0; line < (BYTES + 63) / 64; line++) {
    if (ROWS == 1) _mm_prefetch(ahead + 64 * line, _MM_HINT_NTA);
    if (ROWS != 1) _mm_prefetch(ahead + 64 * line, _MM_HINT_T1);
  }
}

// ---------------------------------------------------------------- AVX2

// Byte of metadata (two groups) -> how four kept values go to eight columns.
struct Permutations {
  alignas(64) int32_t lanes[256][8];  // float32: lane of each column; lane 4 holds a zero
  alignas(64) uint8_t widened[256][32];  // 16 bits to the upper halves of 32: byte of each byte, 0x80 for a zero
  alignas(64) uint8_t halves[256][16];  // the same in 16 bits
  Permutations() {
    std::fill(&lanes[0][0], &lanes[0][0] + 256 * 8, 4);
    std::memset(widened, 0x80, sizeof widened);
    std::memset(halves, 0x80, sizeof halves);
    for (int byte = 0; byte < 256; byte++)
      for (int k = 0; k < 4; k++) {
        const int column = 4 * (k / 2) + (byte >> 2 * k & 3);
        lanes[byte][column] = k;
        for (int part = 0; part < 2; part++) {
          widened[byte][4 * column + 2 + part] = halves[byte][2 * column + part] = uint8_t(2 * k + part);
        }
      }
  }
};
const Permutations kPermutations;

AVX2 inline __m256 spread_eight(const float* values, uint8_t byte) {
  __m256i lanes = _mm256_load_si256((const __m256i*)kPermutations.lanes[byte]);
  return _mm256_permutevar8x32_ps(_mm256_zextps128_ps256(_mm_loadu_ps(values)), lanes);
}
AVX2 inline __m256 spread_eight(const bf16* values, uint8_t byte) {
  int64_t four;
  std::memcpy(&four, values, 8);
  __m256i bytes = _mm256_load_si256((const __m256i*)kPermutations.widened[byte]);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x(four), bytes));
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
    if (b % 16 == 0) _mm_prefetch((const char*)(p.meta + (n + ROWS) * p.words()) + ROWS * b, _MM_HINT_T1);
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
      p.to.put(n + r, first + t, sum_lanes(sum));
    }
}
// Sixteen registers hold twelve sums beside the operands. Two rows share what is loaded of many tokens, four of few.
template <class T>
AVX2 void rows_avx2(const Problem<T, float>& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += 4) {
    int64_t t = 0;
    if (n + 4 <= end) {
      for (; t + 6 <= p.tokens; t += 6)
        for (int64_t r = n; r < n + 4; r += 2) tile_avx2<2, 6, 1>(p, r, t);
      for (; t + 2 <= p.tokens; t += 2) tile_avx2<4, 2, 1>(p, n, t);
      for (; t < p.tokens; t++) tile_avx2<4, 1, 2>(p, n, t);
    }
    for (int64_t r = n; r < std::min(n + 4, end); r++)
      for (int64_t u = t; u < p.tokens; u++) tile_avx2<1, 1, 4>(p, r, u);
  }
}
AVX2 void unpack_avx2(const float* values, const uint32_t* meta, float* dense, int64_t columns) {
  const uint8_t* bytes = (const uint8_t*)meta;
  for (int64_t b = 0; b < columns / 8; b++) _mm256_storeu_ps(dense + 8 * b, spread_eight(values + 4 * b, bytes[b]));
}
AVX2 void unpack_avx2(const uint16_t* values, const uint32_t* meta, uint16_t* dense, int64_t columns) {
  const uint8_t* bytes = (const uint8_t*)meta;
  for (int64_t b = 0; b < columns / 8; b++) {
    __m128i places = _mm_load_si128((const __m128i*)kPermutations.halves[bytes[b]]);
    __m128i four = _mm_loadl_epi64((const __m128i*)(values + 4 * b));
    _mm_storeu_si128((__m128i*)(dense + 8 * b), _mm_shuffle_epi8(four, places));
  }
}

// ---------------------------------------------------------------- AVX-512

constexpr int kRows = 8;  // of a block
// From so many tokens on a block beats a pass over the weight for every few of them.
template <class X>
constexpr int64_t kManyTokens = sizeof(X) == 2 ? 9 : 24;

#define TARGET AVX512
namespace in_float {

TARGET inline __m512 load_kept(const float* values) { return _mm512_loadu_ps(values); }
TARGET inline __m512 load_kept(const bf16* values) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

template <int ROWS, int TOKENS, int STEPS, class T>
TARGET inline void add_word(const Problem<T, float>& p, int64_t n, int64_t first, int64_t w, int step,
                            __m512 (&sums)[ROWS][TOKENS][STEPS]) {
  __m512 kept[ROWS];
  __m512i places[ROWS];
  for (int r = 0; r < ROWS; r++) {
    kept[r] = load_kept(p.values + (n + r) * p.kept() + 16 * w);
    places[r] = places_of(p.meta[(n + r) * p.words() + w]);
  }
  for (int t = 0; t < TOKENS; t++) {
    const float* x = p.inputs + (first + t) * p.columns + 32 * w;
    __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
    for (int r = 0; r < ROWS; r++) {
      __m512 inputs = _mm512_permutex2var_ps(low, places[r], high);
      sums[r][t][step] = _mm512_fmadd_ps(kept[r], inputs, sums[r][t][step]);
    }
  }
}
constexpr bool kFetchesMeta = true;

template <class T>
TARGET inline void spread_word(const T* values, const uint32_t& word, float* dense) {
  for (int b = 0; b < 4; b++) _mm256_store_ps(dense + 8 * b, spread_eight(values + 4 * b, uint8_t(word >> 8 * b)));
}
TARGET inline __m512 multiply_add(const float* weight, const float* inputs, __m512 sum) {
  return _mm512_fmadd_ps(_mm512_load_ps(weight), _mm512_loadu_ps(inputs), sum);
}
TARGET inline void store_eight(const float* sums, float* out) { _mm256_storeu_ps(out, _mm256_loadu_ps(sums)); }
TARGET inline void store_eight(const float* sums, bf16* out) { _mm_storeu_si128((__m128i*)out, round_eight(sums)); }

#include "products24.h"

// Rows in fours for one token as well: on the machines that have no bfloat16 products the second-level cache fetches
// four streams faster than one past the caches.
template <int ROWS, class T>
TARGET void all_tokens(const Problem<T, float>& p, int64_t n) {
  int64_t t = 0;
  for (; t + 4 <= p.tokens; t += 4) tile<ROWS, 4, 1>(p, n, t);
  if (p.tokens - t == 3) tile<ROWS, 3, 1>(p, n, t);
  if (p.tokens - t == 2) tile<ROWS, 2, 2>(p, n, t);
  if (p.tokens - t == 1) tile<ROWS, 1, 2>(p, n, t);
}
template <class T>
TARGET void rows_few(const Problem<T, float>& p, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + 4 <= end; n += 4) all_tokens<4>(p, n);
  for (; n < end; n++) all_tokens<1>(p, n);
}

}  // namespace in_float
#undef TARGET

#define TARGET AVX512_BF16
namespace in_bf16 {

template <int ROWS, int TOKENS, int STEPS>
TARGET inline void add_word(const Problem<bf16, bf16>& p, int64_t n, int64_t first, int64_t w, int step,
                            __m512 (&sums)[ROWS][TOKENS][STEPS]) {
  __m512i dense[ROWS];
  for (int r = 0; r < ROWS; r++) {
    dense[r] = spread(load_16(p.values + (n + r) * p.kept() + 16 * w), p.meta[(n + r) * p.words() + w]);
  }
  for (int t = 0; t < TOKENS; t++) {
    __m512i inputs = _mm512_loadu_si512(p.inputs + (first + t) * p.columns + 32 * w);
    for (int r = 0; r < ROWS; r++) {
      sums[r][t][step] = _mm512_dpbf16_ps(sums[r][t][step], (__m512bh)dense[r], (__m512bh)inputs);
    }
  }
}
constexpr bool kFetchesMeta = false;

TARGET inline void spread_word(const bf16* values, const uint32_t& word, bf16* dense) {
  _mm512_store_si512(dense, spread(load_16(values), word));
}
TARGET inline __m512 multiply_add(const bf16* weight, const bf16* inputs, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_load_si512(weight), (__m512bh)_mm512_loadu_si512(inputs));
}
TARGET inline void store_eight(const float* sums, bf16* out) {
  _mm_storeu_si128((__m128i*)out, (__m128i)_mm256_cvtneps_pbh(_mm256_loadu_ps(sums)));
}

#include "products24.h"

// Rows in fours for one token as well: four streams, fetched into the second-level cache, are read faster than one.
TARGET void rows_few(const Problem<bf16, bf16>& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += 4) {
    int64_t t = 0;
    if (n + 4 <= end) {
      for (; t + 4 <= p.tokens; t += 4) tile<4, 4, 1>(p, n, t);
      for (; t + 2 <= p.tokens; t += 2) tile<4, 2, 2>(p, n, t);
      for (; t < p.tokens; t++) tile<4, 1, 2>(p, n, t);
    }
    for (int64_t r = n; r < std::min(n + 4, end); r++)
      for (int64_t u = t; u < p.tokens; u++) tile<1, 1, 4>(p, r, u);
  }
}

#include "tiles.h"

AMX void rows_on_tiles(const Problem<bf16, bf16>& p, int64_t begin, int64_t end) {
  rows_tiled(p, begin, end, Spread24<bf16, bf16>{p});
}

TARGET void unpack(const uint16_t* values, const uint32_t* meta, uint16_t* dense, int64_t columns) {
  for (int64_t w = 0; w < columns / 32; w++)
    _mm512_storeu_si512(dense + 32 * w, spread(load_16(values + 16 * w), meta[w]));
}

}  // namespace in_bf16
#undef TARGET
#endif  // X86

// ---------------------------------------------------------------- threads and choice of path

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

template <class T, class X>
void run(const Problem<T, X>& gate, const Problem<T, X>& up, int threads,
         void (*rows)(const Problem<T, X>&, int64_t, int64_t)) {
  gate.values ? multiply_gated(gate, up, threads, rows) : multiply(up, threads, rows);
}

// One product, or with gate_values the gated one, on the path of `level`.
template <class T>
void product(const T* gate_values, const uint32_t* gate_meta, const T* values, const uint32_t* meta, const T* inputs,
             Output<T> to, int64_t columns, int64_t tokens, int threads, int level) {
#if X86
  if constexpr (std::is_same_v<T, bf16>) {
    if (level >= kAmx && tokens >= kTiledTokens) {
      const std::vector<bf16> pairs = in_bf16::in_pairs(inputs, tokens, columns);
      Problem<bf16, bf16> gate{gate_values, gate_meta, pairs.data(), columns, tokens, to};
      return run(gate, {values, meta, pairs.data(), columns, tokens, to}, threads, in_bf16::rows_on_tiles);
    }
    Problem<bf16, bf16> gate{gate_values, gate_meta, inputs, columns, tokens, to};
    Problem<bf16, bf16> up{values, meta, inputs, columns, tokens, to};
    const auto rows = tokens < kManyTokens<bf16> ? in_bf16::rows_few : in_bf16::rows_many<bf16, bf16>;
    if (level >= kAvx512Bf16) return run(gate, up, threads, rows);
  }
#endif
  const std::vector<float> wide = widened(inputs, sizeof(T) == 4 ? 0 : tokens * columns);
  const float* x = sizeof(T) == 4 ? (const float*)inputs : wide.data();
  Problem<T, float> gate{gate_values, gate_meta, x, columns, tokens, to};
  Problem<T, float> up{values, meta, x, columns, tokens, to};
#if X86
  const auto rows = tokens < kManyTokens<float> ? in_float::rows_few<T> : in_float::rows_many<T, float>;
  if (level >= kAvx512) return run(gate, up, threads, rows);
  if (level >= kAvx2) return run(gate, up, threads, rows_avx2<T>);
#endif
  run(gate, up, threads, rows_plain<T>);
}

}  // namespace

extern "C" {

// 0 plain loops, 1 AVX2, 2 AVX-512, 3 AVX-512 with bfloat16 products: the best path of this machine.
int sparse24_level() {
#if X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    const bool bytes = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
    return bytes && __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPlain;
}

// Whether there are AMX tiles for bfloat16, and the system lets this process use them.
int sparse24_has_tiles() {
#if X86 && defined(__linux__)
  unsigned a, b, c, d;
  if (sparse24_level() < kAvx512Bf16 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  const bool tiles = d >> 22 & 1 && d >> 24 & 1;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return tiles && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return 0;
#endif
}

// inputs [tokens, columns], out [tokens, rows], bias [rows] or null, all bfloat16.
void sparse24_matmul_bf16(const bf16* values, const uint32_t* meta, const bf16* inputs, const bf16* bias, bf16* out,
                          int64_t rows, int64_t columns, int64_t tokens, int threads, int level) {
  product<bf16>(nullptr, nullptr, values, meta, inputs, {out, bias, rows}, columns, tokens, threads, level);
}

// The same in float32.
void sparse24_matmul_f32(const float* values, const uint32_t* meta, const float* inputs, const float* bias, float* out,
                         int64_t rows, int64_t columns, int64_t tokens, int threads, int level) {
  product<float>(nullptr, nullptr, values, meta, inputs, {out, bias, rows}, columns, tokens, threads, level);
}

// out = silu(inputs gate^T) * (inputs up^T), both weights of one shape.
void sparse24_swiglu_bf16(const bf16* gate_values, const uint32_t* gate_meta, const bf16* values, const uint32_t* meta,
                          const bf16* inputs, bf16* out, int64_t rows, int64_t columns, int64_t tokens, int threads,
                          int level) {
  product<bf16>(gate_values, gate_meta, values, meta, inputs, {out, nullptr, rows}, columns, tokens, threads, level);
}

void sparse24_swiglu_f32(const float* gate_values, const uint32_t* gate_meta, const float* values, const uint32_t* meta,
                         const float* inputs, float* out, int64_t rows, int64_t columns, int64_t tokens, int threads,
                         int level) {
  product<float>(gate_values, gate_meta, values, meta, inputs, {out, nullptr, rows}, columns, tokens, threads, level);
}

// Ask the system to back the whole 2 MiB pieces of a range by huge pages, in place: a weight that streams past needs its
// address translated every 4 KiB otherwise. A hint: whatever does not allow it stays as it is.
void sparse24_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t size = 1 << 21, mask = ~(size - 1);
  const uintptr_t begin = ((uintptr_t)data + size - 1) & mask, end = ((uintptr_t)data + bytes) & mask;
  if (end <= begin || madvise((void*)begin, end - begin, MADV_HUGEPAGE)) return;
  madvise((void*)begin, end - begin, 25);  // MADV_COLLAPSE, since Linux 6.1; without it the kernel takes its time
#endif
}

// dense [rows, columns] from a packed weight whose rows are padded to `padded` columns; any 16-bit type.
void sparse24_unpack_16(const uint16_t* values, const uint32_t* meta, uint16_t* dense, int64_t rows, int64_t padded,
                        int64_t columns, int threads, int level) {
#if X86
  if (level >= kAvx512Bf16) return unpack_rows(values, meta, dense, rows, padded, columns, threads, in_bf16::unpack);
  if (level >= kAvx2) return unpack_rows<uint16_t>(values, meta, dense, rows, padded, columns, threads, unpack_avx2);
#endif
  unpack_rows(values, meta, dense, rows, padded, columns, threads, unpack_plain<uint16_t>);
}

// The same for float32.
void sparse24_unpack_32(const float* values, const uint32_t* meta, float* dense, int64_t rows, int64_t padded,
                        int64_t columns, int threads, int level) {
#if X86
  if (level >= kAvx2) return unpack_rows<float>(values, meta, dense, rows, padded, columns, threads, unpack_avx2);
#endif
  unpack_rows(values, meta, dense, rows, padded, columns, threads, unpack_plain<float>);
}

}  // extern "C"
