// Products with bitmask weights, over the vector primitives of one instruction set. Few tokens: a tile of rows and
// tokens whose sums stay in registers. Many: blocks.h.
//
// Included once for each instruction set, with TARGET for its functions, inside a namespace that has what blocks.h wants
// and
//     Weights, Part                              a register of dense weights, the bits of the mask that it takes
//     load(inputs), fused(weight, inputs, sum)   a register of inputs; sum + weight * inputs
//     scaled(scale, sum, total)                  total + scale * sum
//     add(a, b), sum_lanes(sum)
//     expand(kind, values, at, part)             the next kept values, from number `at` on, where the bits are set
//     times(weights, scale), put(weights, out)   dense weights, and where they go

// A row's part of the values: the number of the next one.
template <class K>
TARGET inline Weights next(const void* values, int64_t& at, Part part) {
  Weights dense = expand(K{}, values, at, part);
  at += __builtin_popcountll(part);
  return dense;
}

constexpr int kParts = 32 / int(8 * sizeof(Part));  // of a word

// While a tile is computed what lies after it is fetched into the second-level cache: the next rows' values and mask.
template <int ROWS, int TOKENS, int STEPS, class K, class X, class T>
TARGET void tile(const Masked<K, X, T>& p, int64_t n, int64_t first) {
  int64_t at[ROWS];
  for (int r = 0; r < ROWS; r++) at[r] = p.offsets[n + r];
  const int64_t ahead = std::max<int64_t>(p.offsets[n + ROWS] - p.offsets[n], 2048);
  const uint32_t* mask = p.mask + n * p.words();
  const X* x = p.inputs + first * p.columns;
  Sums total[ROWS][TOKENS];
  for (auto& row : total)
    for (auto& sum : row) sum = zero();
  for (int64_t s = 0; s < p.groups(); s++) {
    Sums sums[ROWS][TOKENS][STEPS];
    for (auto& row : sums)
      for (auto& token : row)
        for (auto& sum : token) sum = zero();
    for (int64_t w = s * p.span(); w < std::min((s + 1) * p.span(), p.words()); w++) {
      for (int r = 0; r < ROWS; r++) {
        _mm_prefetch((const char*)p.values + (at[r] + ahead) * K::kBits / 8, _MM_HINT_T1);
        if (w % 16 == 0) _mm_prefetch((const char*)(mask + (ROWS + r) * p.words() + w), _MM_HINT_T1);
      }
      for (int part = 0; part < kParts; part++) {
        Weights dense[ROWS];
        for (int r = 0; r < ROWS; r++) {
          dense[r] = next<K>(p.values, at[r], Part(mask[r * p.words() + w] >> part * (32 / kParts)));
        }
        for (int t = 0; t < TOKENS; t++) {
          auto inputs = load(x + t * p.columns + 32 * w + part * (32 / kParts));
          for (int r = 0; r < ROWS; r++) {
            sums[r][t][part % STEPS] = fused(dense[r], inputs, sums[r][t][part % STEPS]);
          }
        }
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int t = 0; t < TOKENS; t++) {
        for (int step = 1; step < STEPS; step++) sums[r][t][0] = add(sums[r][t][0], sums[r][t][step]);
        total[r][t] = K::kScaled ? scaled(p.scale(n + r, s), sums[r][t][0], total[r][t]) : sums[r][t][0];
      }
  }
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < TOKENS; t++) p.to.put(n + r, first + t, sum_lanes(total[r][t]));
}

template <int ROWS, class K, class X, class T>
TARGET void all_tokens(const Masked<K, X, T>& p, int64_t n) {
  int64_t t = 0;
  for (; t + kFewTokens <= p.tokens; t += kFewTokens) tile<ROWS, kFewTokens, 1>(p, n, t);
  for (; t < p.tokens; t++) tile<ROWS, 1, kSteps>(p, n, t);
}
template <class K, class X, class T>
TARGET void rows_few(const Masked<K, X, T>& p, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + 4 <= end; n += 4) all_tokens<4>(p, n);
  for (; n < end; n++) all_tokens<1>(p, n);
}

#include "blocks.h"

// `words` words of a row from word `first` on, dense and scaled, to `out`; `at` goes on.
template <class K, class X, class T, class Out>
TARGET inline void spread(const Masked<K, X, T>& p, int64_t n, int64_t first, int64_t words, int64_t& at, Out* out) {
  const uint32_t* mask = p.mask + n * p.words() + first;
  for (int64_t w = 0; w < words; w++) {
    const float scale = K::kScaled ? p.scale(n, (first + w) / p.span()) : 1;
    for (int part = 0; part < kParts; part++) {
      Weights dense = next<K>(p.values, at, Part(mask[w] >> part * (32 / kParts)));
      put(K::kScaled ? times(dense, scale) : dense, out + 32 * w + part * (32 / kParts));
    }
  }
}

template <class K, class X, class T>
struct SpreadRows {
  const Masked<K, X, T>& p;
  int64_t at[32];
  TARGET void operator()(int64_t n, int64_t r, int64_t first, int64_t words, X* row) {
    if (first == 0) at[r] = p.offsets[n + r];
    spread(p, n + r, first, words, at[r], row);
  }
};
template <class K, class X, class T>
TARGET void rows_many(const Masked<K, X, T>& p, int64_t begin, int64_t end) {
  rows_blocked<X>(p, begin, end, SpreadRows<K, X, T>{p, {}});
}

// Rows of the dense weight itself, [n, real] of the padded columns.
template <class K, class T>
TARGET void unpack_rows(const Masked<K, T, T>& p, T* dense, int64_t real, int64_t begin, int64_t end) {
  std::vector<T> whole(p.columns);
  for (int64_t n = begin; n < end; n++) {
    int64_t at = p.offsets[n];
    T* row = real == p.columns ? dense + n * real : whole.data();
    spread(p, n, 0, p.words(), at, row);
    if (row == whole.data()) std::copy(row, row + real, dense + n * real);
  }
}
