// Products of many tokens on AMX tiles: a strip of 32 rows is spread out once for up to 128 tokens, as two columns of
// tiles of 16 rows times 32 inputs. Tokens come as tiles too, in pairs of inputs, so that TDPBF16PS multiplies them.
//
// Included after blocks.h, in the namespace of bfloat16 products. Nothing here runs before the library has tried it
// against other paths (library.py).

constexpr int64_t kStrip = 32, kSpan = 128, kDepth = 1024;  // rows and tokens at a time, and inputs
constexpr int64_t kTile = 512;                                 // bfloat16 numbers of a tile

// inputs [tokens, columns] -> [blocks of 16 tokens][columns / 32][16 pairs][16 tokens][2], zeros after the last token
inline std::vector<bf16> in_pairs(const bf16* inputs, int64_t tokens, int64_t columns) {
  const int64_t blocks = (tokens + 15) / 16;
  std::vector<bf16> pairs(blocks * 16 * columns);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t w = 0; w < columns / 32; w++) {
      bf16* tile = pairs.data() + (t / 16 * (columns / 32) + w) * kTile + t % 16 * 2;
      for (int64_t i = 0; i < 16; i++) std::memcpy(tile + 32 * i, inputs + t * columns + 32 * w + 2 * i, 4);
    }
  return pairs;
}

AMX inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } tiles;
  for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
  _tile_loadconfig(&tiles);
}

// sums [16 rows, 16 tokens] of 32 rows and one or two blocks of tokens += strip x pairs, over `steps` tiles. The strip's
// second 16 rows, the second block's pairs and sums come `strip_step`, `pairs_step` and 512 numbers later.
template <bool TWO>
AMX inline void multiply_tiles(const bf16* strip, int64_t strip_step, const bf16* pairs, int64_t pairs_step,
                               int64_t steps, float* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + 256, 64);
  if (TWO) {
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
  }
  for (int64_t s = 0; s < steps; s++) {
    _tile_loadd(4, strip + s * kTile, 64);
    _tile_loadd(6, pairs + s * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, strip + strip_step + s * kTile, 64);
    _tile_dpbf16ps(1, 5, 6);
    if (TWO) {
      _tile_loadd(7, pairs + pairs_step + s * kTile, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if (TWO) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

// sums [blocks][2][16 rows][16 tokens] of rows n.. and tokens first.. to their places, eight rows at a time.
template <class T>
AMX void put_tiles(const Output<T>& to, int64_t n, int64_t rows, int64_t first, int64_t tokens, const float* sums) {
  for (int64_t r = 0; r < rows; r += kRows)
    for (int64_t b = 0; 16 * b < tokens; b++) {
      float turned[16 * kRows];
      const float* tile = sums + 512 * b + 256 * (r / 16) + 16 * (r % 16);
      for (int t = 0; t < 16; t++)
        for (int i = 0; i < kRows; i++) turned[kRows * t + i] = tile[16 * i + t];
      const int64_t count = std::min<int64_t>(16, tokens - 16 * b);
      put_rows(to, n + r, std::min<int64_t>(kRows, rows - r), first + 16 * b, count, turned);
    }
}

// `p.inputs` in pairs; spread as of `rows_blocked`.
template <class P, class Spread>
AMX void rows_tiled(const P& p, int64_t begin, int64_t end, Spread spread) {
  configure_tiles();
  std::vector<bf16> room(kStrip * kDepth + 32);
  bf16* strip = (bf16*)(((uintptr_t)room.data() + 63) & ~uintptr_t(63));
  std::vector<float> sums(kStrip * kSpan);
  for (int64_t n = begin; n < end; n += kStrip)
    for (int64_t t = 0; t < p.tokens; t += kSpan) {
      const int64_t rows = std::min(kStrip, end - n), tokens = std::min(kSpan, p.tokens - t);
      std::fill(sums.begin(), sums.end(), 0.0f);
      if (rows < kStrip) std::fill(strip, strip + kStrip * kDepth, bf16(0));
      for (int64_t first = 0; first < p.words(); first += kDepth / 32) {
        const int64_t steps = std::min(kDepth / 32, p.words() - first), half = steps * kTile;
        for (int64_t r = 0; r < rows; r++)
          for (int64_t s = 0; s < steps; s++)
            spread(n, r, first + s, 1, strip + r / 16 * half + s * kTile + r % 16 * 32);
        const int64_t blocks = (tokens + 15) / 16, step = p.words() * kTile;
        for (int64_t b = 0; b < blocks; b += 2) {
          const bf16* pairs = p.inputs + (t / 16 + b) * step + first * kTile;
          (b + 1 < blocks ? multiply_tiles<true> : multiply_tiles<false>)(strip, half, pairs, step, steps,
                                                                           sums.data() + 512 * b);
        }
      }
      put_tiles(p.to, n, rows, t, tokens, sums.data());
    }
  _tile_release();
}
