// A plain read of memory, for benchmarks: the least time that any product with so many bytes of weights can take.

#include "common24.h"

namespace {

// Four independent sums, which the compiler makes vectors of as wide as the function that they are part of allows.
__attribute__((always_inline)) inline uint64_t sum_words(const uint64_t* words, int64_t count) {
  uint64_t sums[32] = {};
  for (int64_t i = 0; i + 32 <= count; i += 32) {
#if X86
    for (int64_t line = 0; line < 32; line += 8) _mm_prefetch((const char*)(words + i + line) + 4096, _MM_HINT_T0);
#endif
    for (int64_t j = 0; j < 32; j++) sums[j] ^= words[i + j];
  }
  uint64_t sum = 0;
  for (uint64_t one : sums) sum ^= one;
  for (int64_t i = count / 32 * 32; i < count; i++) sum ^= words[i];
  return sum;
}

uint64_t sum_plain(const uint64_t* words, int64_t count) { return sum_words(words, count); }
#if X86
AVX2 uint64_t sum_avx2(const uint64_t* words, int64_t count) { return sum_words(words, count); }
AVX512 uint64_t sum_avx512(const uint64_t* words, int64_t count) { return sum_words(words, count); }
#endif

}  // namespace

// *sum = the exclusive or of the 64-bit words at `data`, of which there are bytes / 8.
extern "C" void sparse24_read(const uint64_t* data, uint64_t* sum, int64_t bytes, int threads, int level) {
  auto words = sum_plain;
#if X86
  if (level >= kAvx2) words = sum_avx2;
  if (level >= kAvx512) words = sum_avx512;
#endif
  uint64_t total = 0;
  in_parallel(bytes / 8, threads, [&](int64_t begin, int64_t end) {
    const uint64_t part = words(data + begin, end - begin);
#pragma omp atomic
    total ^= part;
  });
  *sum = total;
}
