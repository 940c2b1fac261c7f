// Products on AVX-512. Few tokens: a tile of rows and tokens whose sums stay in registers. Many: eight rows at a time
// are spread out once, 16 KiB that stay in the first-level cache beside the inputs; tiles of four rows and six tokens,
// 24 sums in registers, run over them for all tokens.
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

template <class X>
constexpr int kLanes = 64 / sizeof(X);  // of a register
template <class X>
constexpr int kWords = kLanes<X>;  // words of metadata in a block: 8 rows of 32 kWords columns are 16 KiB

// The four sums over all lanes of a, b, c, d.
TARGET inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512 four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  __m128 upper = _mm_add_ps(_mm512_extractf32x4_ps(four, 2), _mm512_extractf32x4_ps(four, 3));
  return _mm_add_ps(_mm_add_ps(_mm512_castps512_ps128(four), _mm512_extractf32x4_ps(four, 1)), upper);
}

// sums [TOKENS, kRows] += four rows of the block times inputs [TOKENS, columns], over `length` columns.
template <int TOKENS, class X>
TARGET void tile_block(const X* block, const X* inputs, int64_t columns, int64_t length, float* sums) {
  __m512 partial[TOKENS][4];
  for (auto& token : partial)
    for (auto& sum : token) sum = _mm512_setzero_ps();
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
template <int TOKENS, class T, class X>
TARGET int64_t tiles_block(const Problem<T, X>& p, const X* block, int64_t first, int64_t length, float* sums,
                           int64_t t) {
  for (; t + TOKENS <= p.tokens; t += TOKENS)
    for (int r = 0; r < kRows; r += 4)
      tile_block<TOKENS>(block + 32 * kWords<X> * r, p.inputs + t * p.columns + first, p.columns, length,
                         sums + t * kRows + r);
  return t;
}

// sums [tokens, kRows] to their places, eight at once where nothing else is to be done to them.
template <class T>
TARGET void put_rows(const Output<T>& to, int64_t n, int64_t rows, int64_t tokens, const float* sums) {
  const bool whole = rows == kRows && !to.gate && !to.bias;
  for (int64_t t = 0; t < tokens; t++, sums += kRows) {
    if (whole) store_eight(sums, to.out + t * to.rows + n);
    for (int64_t r = 0; r < rows && !whole; r++) to.put(n + r, t, sums[r]);
  }
}

template <class T, class X>
TARGET void rows_many(const Problem<T, X>& p, int64_t begin, int64_t end) {
  alignas(64) X block[32 * kWords<X> * kRows] = {};
  std::vector<float> sums(p.tokens * kRows);
  for (int64_t n = begin; n < end; n += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, end - n);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t first = 0; first < p.words(); first += kWords<X>) {
      const int64_t words = std::min<int64_t>(kWords<X>, p.words() - first);
      for (int64_t r = 0; r < rows; r++) {
        const T* values = p.values + (n + r) * p.kept() + 16 * first;
        const uint32_t* meta = p.meta + (n + r) * p.words() + first;
        for (int64_t w = 0; w < words; w++) {
          _mm_prefetch((const char*)(values + kRows * p.kept() + 16 * w), _MM_HINT_T1);
          spread_word(values + 16 * w, meta[w], block + 32 * (r * kWords<X> + w));
        }
      }
      int64_t t = tiles_block<6>(p, block, 32 * first, 32 * words, sums.data(), 0);
      t = tiles_block<3>(p, block, 32 * first, 32 * words, sums.data(), t);
      tiles_block<1>(p, block, 32 * first, 32 * words, sums.data(), t);
    }
    put_rows(p.to, n, rows, p.tokens, sums.data());
  }
}
