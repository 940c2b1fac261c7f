// Products with 2:4 weights on AVX-512. Few tokens: a tile of rows and tokens whose sums stay in registers. Many:
// blocks.h, tiles of four rows and six tokens, 24 sums in registers.
//
// Included once for each kind of product, with TARGET for its functions, inside a namespace that has before
//     add_word(p, n, first, w, step, sums)    a word of metadata of some rows times some tokens
//     kFetchesMeta                            whether the metadata after a tile is fetched with its values
//     spread_word(values, word, dense)        32 weights of type X from sixteen kept values of type T
//     multiply_add(weight, inputs, sum)       one register of each
//     store_eight(sums, out)                  eight float32 sums, rounded

template <int ROWS, int TOKENS, int STEPS, class T, class X>
TARGET void tile(const Problem<T, X>& p, int64_t n, int64_t first) {
  __m512 sums[ROWS][TOKENS][STEPS];
  for (auto& row : sums)
    for (auto& token : row)
      for (auto& sum : token) sum = _mm512_setzero_ps();
  int64_t w = 0;
  for (; w + STEPS <= p.words(); w += STEPS) {
    prefetch<ROWS, ROWS * STEPS * 16 * int(sizeof(T))>(p.values + n * p.kept(), 16 * w, p.kept());
    const uint32_t* next = p.meta + (n + ROWS) * p.words() + ROWS * w;
    if (kFetchesMeta && w % 4 == 0) _mm_prefetch((const char*)next, _MM_HINT_T1);  // a line: four rows of four words
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

using Sums = __m512;
constexpr int kTokens = 6;
TARGET inline __m512 zero() { return _mm512_setzero_ps(); }
TARGET inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) { return sum_four(a, b, c, d); }

#include "blocks.h"

template <class T, class X>
struct Spread24 {
  const Problem<T, X>& p;
  TARGET void operator()(int64_t n, int64_t r, int64_t first, int64_t words, X* row) const {
    const T* values = p.values + (n + r) * p.kept() + 16 * first;
    const uint32_t* meta = p.meta + (n + r) * p.words() + first;
    for (int64_t w = 0; w < words; w++) {
      _mm_prefetch((const char*)(values + kRows * p.kept() + 16 * w), _MM_HINT_T1);
      spread_word(values + 16 * w, meta[w], row + 32 * w);
    }
  }
};
template <class T, class X>
TARGET void rows_many(const Problem<T, X>& p, int64_t begin, int64_t end) {
  rows_blocked<X>(p, begin, end, Spread24<T, X>{p});
}
