// A linear layer behind a norm, and how its weights are laid out.

#include <omp.h>
#include <sys/mman.h>

#include <memory>

#include "norms.h"
#include "product.h"

extern "C" {

// See Matrix.
int64_t panel_width() { return PANEL; }

// Asks the system for large pages before memory is written to: matrices are read from one end to the other.
void use_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / PAGE * PAGE;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// [rows, inputs] -> [rows, outputs].
void run_normed_linear(
    const Norm* norm, const Matrix* matrix, const float* input, int64_t rows, float* result, int64_t threads) {
  const int64_t width = matrix->inputs;
  const std::unique_ptr<float[]> memory(new float[rows * spaced(width)]);
  const Rows from{const_cast<float*>(input), width, rows}, to{result, matrix->outputs, rows};
  const Rows normed{memory.get(), spaced(width), rows};
#pragma omp parallel num_threads(threads)
  {
    const Member member{omp_get_thread_num(), omp_get_num_threads()};
    normalize(*norm, from, width, normed, member);
#pragma omp barrier
    multiply(*matrix, normed, member, [&](const Tile& tile, float* values) {
      add_bias(*matrix, tile, values);
      write(tile, values, to);
    });
  }
}
}
