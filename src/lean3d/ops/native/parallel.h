// Work in pieces over threads. Where PyTorch has brought GNU's OpenMP into the process its thread pool is used, so that
// two pools don't fight over the cores; elsewhere threads of our own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lean3d {

namespace detail {
using Task = void (*)(const void* context, int64_t piece, int thread);
void run(int64_t pieces, int threads, Task task, const void* context);
}  // namespace detail

// body(piece, thread) for every piece in [0, pieces), each once, in any order; thread is in [0, threads). Nothing may
// throw in it.
template <class Body>
void parallel(int64_t pieces, int threads, const Body& body) {
  detail::run(
      pieces, threads, [](const void* b, int64_t piece, int thread) { (*static_cast<const Body*>(b))(piece, thread); },
      &body);
}

// At least `count` floats that belong to this thread until it asks again for the same slot: kept between calls,
// aligned to 64 bytes, not set to anything.
float* scratch(int slot, size_t count);

// "libgomp" or "threads".
const char* thread_pool();

}  // namespace lean3d
