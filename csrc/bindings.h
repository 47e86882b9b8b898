// Helpers for the bindings: checks with messages that name the argument, new tensors, and the current CUDA stream.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

namespace somnium {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t any_size = -1;

inline std::string shape_text(const int64_t* sizes, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) {
    text += (i ? ", " : "") + (sizes[i] == any_size ? std::string("*") : std::to_string(sizes[i]));
  }
  return text + "]";
}

// Refuses a tensor that is not contiguous, not on `home`'s device, not of `type`, or not of `shape` (any_size: free).
inline void check(const Tensor& tensor, const char* name, const Tensor& home, ScalarType type,
                  std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; fits && i < tensor.dim(); ++i) {
    const int64_t wanted = shape.begin()[i];
    fits = wanted == any_size || wanted == tensor.size(i);
  }
  STD_TORCH_CHECK(fits, name, " must have shape ", shape_text(shape.begin(), shape.size()), ", got ",
                  shape_text(tensor.sizes().data(), tensor.dim()));
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_cuda() == home.is_cuda() && tensor.get_device_index() == home.get_device_index(), name,
                  " must be on the same device as the other arguments");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* read(const std::optional<Tensor>& tensor) {
  return tensor ? read<T>(*tensor) : nullptr;
}

template <class T>
T* write(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls body(T()) with the tensor's scalar type.
template <class Body>
auto dispatch(const Tensor& tensor, const char* name, const Body& body) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, " must be float32 or float64, got ",
                  torch::headeronly::toString(type));
  return type == ScalarType::Double ? body(double()) : body(float());
}

// A new tensor on home's device, not initialised. On Linux a large one asks for huge pages first: for outputs of tens of
// megabytes the page faults of the first write cost several times more than the write itself.
inline Tensor new_output(const Tensor& home, const std::vector<int64_t>& sizes, ScalarType type) {
  Tensor out = torch::stable::new_empty(home, sizes, type);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.is_cpu() ? out.const_data_ptr() : nullptr);
  const uintptr_t end = begin + out.numel() * out.element_size();
  const uintptr_t first = (begin + huge - 1) / huge * huge;  // whole huge pages only: the rest may be someone else's
  if (begin && first + huge <= end) madvise(reinterpret_cast<void*>(first), (end - first) / huge * huge, MADV_HUGEPAGE);
#endif
  return out;
}

// Makes the tensor's GPU current for the launches in its scope and knows the stream that torch uses there.
#ifdef USE_CUDA
class __attribute__((visibility("hidden"))) Launch {
 public:
  explicit Launch(const Tensor& home) : guard_(home.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(home.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// A launcher returns nullptr or the CUDA error's text.
inline void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, "CUDA launch failed: ", error); }
#endif

}  // namespace somnium
