// The CPU loop over any operator's items.
#include "kernel.h"
#include "parallel.h"

namespace somnium::raymarching {

template <class Body>
void run_cpu(const Body& body) {
  parallel_for(body.items, 64, [&body](int64_t begin, int64_t end) {
    const Body local = body;  // nobody else can change it, so its fields stay in registers
    for (int64_t i = begin; i < end; ++i) local(i);
  });
}

#define SOMNIUM_CPU(...) template void run_cpu(const __VA_ARGS__&);
SOMNIUM_RAYMARCHING_ALL(SOMNIUM_CPU)

}  // namespace somnium::raymarching
