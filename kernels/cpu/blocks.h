// Products of many tokens: eight rows at a time are spread out once, 8 to 16 KiB that stay in the first-level cache
// beside the inputs; tiles of four rows and a few tokens, whose sums are in registers, run over them for all tokens.
//
// Included once for each kind of product, with TARGET for its functions, inside a namespace that has before
//     Sums, zero()                          a register of float32 sums
//     multiply_add(weight, inputs, sum)     one register of each, from memory
//     sum_lanes(a, b, c, d)                 the four sums over all lanes
//     store_eight(sums, out)                eight float32 sums, rounded
//     kTokens                               tokens of the largest tile

constexpr int kRows = 8;  // of a block
template <class X>
constexpr int kLanes = int(sizeof(Sums) / sizeof(X));  // of a register
template <class X>
constexpr int kWords = kLanes<X>;  // words of metadata in a block: 8 rows of 32 kWords columns

// sums [TOKENS, kRows] += four rows of the block times inputs [TOKENS, columns], over `length` columns.
template <int TOKENS, class X>
TARGET void tile_block(const X* block, const X* inputs, int64_t columns, int64_t length, float* sums) {
  Sums partial[TOKENS][4];
  for (auto& token : partial)
    for (auto& sum : token) sum = zero();
  for (int64_t c = 0; c < length; c += kLanes<X>)
    for (int t = 0; t < TOKENS; t++)
      for (int r = 0; r < 4; r++)
        partial[t][r] = multiply_add(block + 32 * kWords<X> * r + c, inputs + t * columns + c, partial[t][r]);
  for (int t = 0; t < TOKENS; t++) {
    __m128 four = sum_lanes(partial[t][0], partial[t][1], partial[t][2], partial[t][3]);
    _mm_storeu_ps(sums + t * kRows, _mm_add_ps(_mm_loadu_ps(sums + t * kRows), four));
  }
}

// Tiles of TOKENS tokens from token `t` on, as many as there are; returns the first token left.
template <int TOKENS, class P, class X>
TARGET int64_t tiles_block(const P& p, const X* block, int64_t first, int64_t length, float* sums, int64_t t) {
  for (; t + TOKENS <= p.tokens; t += TOKENS)
    for (int r = 0; r < kRows; r += 4)
      tile_block<TOKENS>(block + 32 * kWords<X> * r, p.inputs + t * p.columns + first, p.columns, length,
                         sums + t * kRows + r);
  return t;
}

// sums [tokens, kRows] to their places, from token `first` on; eight at once where nothing else is to be done to them.
template <class T>
TARGET void put_rows(const Output<T>& to, int64_t n, int64_t rows, int64_t first, int64_t tokens, const float* sums) {
  const bool whole = rows == kRows && !to.gate && !to.bias;
  for (int64_t t = first; t < first + tokens; t++, sums += kRows) {
    if (whole) store_eight(sums, to.out + t * to.rows + n);
    for (int64_t r = 0; r < rows && !whole; r++) to.put(n + r, t, sums[r]);
  }
}

// spread(n, r, first, words, row): `words` words of row n + r from word `first` on, to `row`; in order for each n.
template <class X, class P, class Spread>
TARGET void rows_blocked(const P& p, int64_t begin, int64_t end, Spread spread) {
  alignas(64) X block[32 * kWords<X> * kRows] = {};
  std::vector<float> sums(p.tokens * kRows);
  for (int64_t n = begin; n < end; n += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, end - n);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t first = 0; first < p.words(); first += kWords<X>) {
      const int64_t words = std::min<int64_t>(kWords<X>, p.words() - first);
      for (int64_t r = 0; r < rows; r++) spread(n, r, first, words, block + 32 * r * kWords<X>);
      int64_t t = tiles_block<kTokens>(p, block, 32 * first, 32 * words, sums.data(), 0);
      t = tiles_block<kTokens / 2>(p, block, 32 * first, 32 * words, sums.data(), t);
      tiles_block<1>(p, block, 32 * first, 32 * words, sums.data(), t);
    }
    put_rows(p.to, n, rows, 0, p.tokens, sums.data());
  }
}
