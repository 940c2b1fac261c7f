// Functions of this library one after another by the same threads: one start of a team for all of them. Each thread
// enters each function, which shares its rows among them (in_parallel), and goes on to the next; where a call needs what
// those before it have written, all wait.

#include "common24.h"

#include <utility>

namespace {

constexpr int kPointers = 11, kSizes = 5;

// A call as program.py fills it in: how many arguments of each type the function takes, then these.
struct Call {
  void* function;
  int64_t pointers, sizes, reals, wholes;
  int64_t waits;  // for all calls before
  int64_t pointer[kPointers];
  int64_t size[kSizes];
  int32_t whole, threads, level;
  float real;
};

template <class T, size_t>
using Each = T;

template <size_t... P, size_t... S, size_t... R, size_t... W>
void invoke(const Call& c, std::index_sequence<P...>, std::index_sequence<S...>, std::index_sequence<R...>,
            std::index_sequence<W...>) {
  using Function =
      void (*)(Each<void*, P>..., Each<int64_t, S>..., Each<float, R>..., Each<int, W>..., int threads, int level);
  ((Function)c.function)((void*)c.pointer[P]..., c.size[S]..., (&c.real)[R]..., (&c.whole)[W]..., c.threads, c.level);
}

struct Signature {
  int64_t pointers, sizes, reals, wholes;
  void (*invoke)(const Call&);

  bool fits(const Call& c) const {
    return c.pointers == pointers && c.sizes == sizes && c.reals == reals && c.wholes == wholes;
  }
};
template <int P, int S, int R, int W>
constexpr Signature signature() {
  return {P, S, R, W, [](const Call& c) {
            invoke(c, std::make_index_sequence<P>{}, std::make_index_sequence<S>{}, std::make_index_sequence<R>{},
                   std::make_index_sequence<W>{});
          }};
}
// Of matmul, swiglu, integer, masked, dense, norm, residual, attend and gate.
constexpr Signature kSignatures[] = {
    signature<5, 3, 0, 0>(), signature<6, 3, 0, 0>(), signature<6, 4, 0, 1>(),
    signature<11, 4, 0, 0>(), signature<4, 3, 0, 0>(), signature<3, 2, 1, 0>(),
    signature<5, 2, 1, 0>(), signature<8, 5, 1, 0>(), signature<3, 1, 0, 0>(),
};

const Signature* find(const Call& call) {
  for (const Signature& signature : kSignatures)
    if (signature.fits(call)) return &signature;
  return nullptr;
}

}  // namespace

extern "C" {

// Whether a program may hold a call.
int sparse24_takes(const void* call) { return find(*(const Call*)call) != nullptr; }

// Run `count` calls, each of them taken.
void sparse24_program(const void* calls, int64_t count, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    in_team = true;
    for (const Call* call = (const Call*)calls; call < (const Call*)calls + count; call++) {
      if (call->waits) {
#pragma omp barrier
      }
      find(*call)->invoke(*call);
    }
    in_team = false;
  }
}

}  // extern "C"
