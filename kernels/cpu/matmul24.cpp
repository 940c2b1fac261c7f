// Products with a packed 2:4 weight on a CPU:  out[t, n] = sum_k weight[n, k] * inputs[t, k] + bias[n],
// and two at once, silu(gate) * up.
//
// Format as in pack.py: values [rows, columns / 2], meta [rows, columns / 32] words of eight nibbles i0 | i1 << 2.
// `columns` is the padded number, a multiple of 32; rows of `inputs` have that length too.
//
// With few tokens the time goes into reading the weight, so 9/16 of the bytes are 9/16 of the time, if expanding the
// weight costs less than waiting for it. AVX-512 bfloat16: the eight nibbles of a word pick eight sets of bit offsets
// out of a table of sixteen (VPERMT2Q), one VPMULTISHIFTQB places 32 weights, VDPBF16PS multiplies. With more tokens
// eight rows at a time are expanded into the first-level cache and multiplied from there. AVX2: a byte of metadata picks
// a permutation of four kept values into eight places; bfloat16 is widened on the way. Tokens share each expansion.

#include "common24.h"

#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
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
// computed the memory behind it is fetched: the next tile into the second-level cache; or, for one row, what comes 6 KiB
// later, and then past the caches where the inputs live.
template <int ROWS, int BYTES, class T>
inline void prefetch(const T* values, int64_t at, int64_t kept) {
  const char* ahead = ROWS == 1 ? (const char*)(values + at) + 6144 : (const char*)(values + ROWS * (kept + at));
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
      p.to.put(n + r, first + t, sum_lanes(sum));
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

template <int ROWS, int TOKENS, int STEPS>
AVX512 inline void add_word(const Problem<bf16, bf16>& p, int64_t n, int64_t first, int64_t w, int step,
                            __m512 (&sums)[ROWS][TOKENS][STEPS]) {
  __m512i dense[ROWS];
  for (int r = 0; r < ROWS; r++) {
    dense[r] = spread(load_kept(p.values + (n + r) * p.kept() + 16 * w), p.meta[(n + r) * p.words() + w]);
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
      p.to.put(n + r, first + t, _mm512_reduce_add_ps(sum));
    }
}
AVX512 void rows_few(const Problem<bf16, bf16>& p, int64_t begin, int64_t end) { ALL_TILES(tile_bf16, 4) }

}  // namespace

#include "block24.h"

namespace {

AVX512 void unpack_avx512(const bf16* values, const uint32_t* meta, bf16* dense, int64_t columns) {
  for (int64_t w = 0; w < columns / 32; w++)
    _mm512_storeu_si512(dense + 32 * w, spread(load_kept(values + 16 * w), meta[w]));
}
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
  Problem<T, T> gate_here{gate_values, gate_meta, inputs, columns, tokens, to};
  Problem<T, T> up_here{values, meta, inputs, columns, tokens, to};
  if (level >= kAvx512Bf16 && tokens >= kManyTokens<T>) return run(gate_here, up_here, threads, rows_many<T>);
  if constexpr (std::is_same_v<T, bf16>) {
    if (level >= kAvx512Bf16) return run(gate_here, up_here, threads, rows_few);
  }
#endif
  std::vector<float> wide(sizeof(T) == 4 ? 0 : tokens * columns);
  for (size_t i = 0; i < wide.size(); i++) wide[i] = to_float(inputs[i]);
  const float* x = sizeof(T) == 4 ? (const float*)inputs : wide.data();
  Problem<T, float> gate{gate_values, gate_meta, x, columns, tokens, to};
  Problem<T, float> up{values, meta, x, columns, tokens, to};
#if X86
  if (level >= kAvx2) return run(gate, up, threads, rows_avx2<T>);
#endif
  run(gate, up, threads, rows_plain<T>);
}

}  // namespace

extern "C" {

// 0 plain loops, 1 AVX2, 2 AVX-512 with bfloat16 products: the best path of this machine.
int sparse24_level() {
#if X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"))
    return kAvx512Bf16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPlain;
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
