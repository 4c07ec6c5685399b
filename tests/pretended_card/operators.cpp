// A pretended CUDA card for CPU builds of torch: tensors are of device cuda:0, its memory is the host's, its
// operators are the CPU's. As on a real one every operator refuses tensors of two devices and generators of the
// CPU, memory runs out, and copies come late. Layouts, workspaces, atomics and speed of CUDA it does not show.
#include <ATen/InferSize.h>
#include <ATen/SDPBackend.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <torch/extension.h>
#include <torch/library.h>

#include "call.h"

namespace pretended {

// As cuDNN does, whose algorithms want memory of their own while they run.
void convolution(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto workspace = Memory::get().allocate(Memory::get().workspace);
  on_the_host(op, stack);
}

at::Tensor empty(
    at::IntArrayRef sizes,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_generic(sizes, &Memory::get(), keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef sizes,
    at::IntArrayRef strides,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>) {
  return new_on_card(sizes, strides, c10::dtype_or_default(dtype));
}

void copy_values(const at::Tensor& to, const at::Tensor& from) {
  at::NoGradGuard no_grad;
  auto target = to.is_cuda() ? host_alias(to) : to;
  target.copy_(from.is_cuda() ? host_alias(from) : from);
}

// From pinned memory a copy is made when somebody waits for its stream; from other memory the host waits for it.
at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.is_cuda() && from.is_cuda()) {
    journal.count("copy on the card");
    copy_values(to, from);
    return to;
  }
  const bool uploads = to.is_cuda();
  journal.count(uploads ? UPLOAD : DOWNLOAD);
  auto& streams = Streams::get();
  const auto& on_host = uploads ? from : to;
  if (!non_blocking || !on_host.is_pinned()) {
    // What fits a driver's staging buffer goes up without a wait; nothing comes down so.
    if (!uploads) journal.count(WAIT);
    streams.wait_for(streams.current);
    copy_values(to, from);
  } else if (!uploads) {
    // The card's later work may change the source, but comes after the copy in its stream.
    const auto snapshot = from.clone();
    streams.later([to, snapshot] { copy_values(to, snapshot); });
  } else if (streams.current == 0) {
    copy_values(to, from);  // what computes with it is in the same stream
  } else {
    if (to.is_floating_point()) host_alias(to).fill_(std::numeric_limits<double>::quiet_NaN());
    streams.later([to, from] { copy_values(to, from); });
  }
  return to;
}

at::Scalar item(const at::Tensor& tensor) {
  journal.count(WAIT);
  Streams::get().wait_for(Streams::get().current);
  return host_alias(tensor).item();
}

at::Tensor view_of(const at::Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(tensor.storage()), tensor.key_set(), tensor.dtype());
  at::native::setStrided(result, sizes, strides, offset);
  return result;
}

at::Tensor as_strided(
    const at::Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<int64_t> offset) {
  return view_of(tensor, sizes, strides, offset.value_or(tensor.storage_offset()));
}

at::Tensor reshape_alias(const at::Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return view_of(tensor, sizes, strides, tensor.storage_offset());
}

at::Tensor view(const at::Tensor& tensor, at::IntArrayRef sizes) {
  const auto inferred = at::infer_size_dv(sizes, tensor.numel());
  const auto strides = at::detail::computeStride(tensor.sizes(), tensor.strides(), inferred);
  TORCH_CHECK(strides, "view size is not compatible with input tensor's size and stride");
  return view_of(tensor, inferred, *strides, tensor.storage_offset());
}

const at::Tensor& resize(const at::Tensor& tensor, at::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  const auto contiguous = at::detail::empty_generic(
      sizes, c10::GetAllocator(at::kMeta), c10::DispatchKeySet(c10::DispatchKey::Meta), tensor.scalar_type(), {});
  const auto bytes = (contiguous.numel() + tensor.storage_offset()) * tensor.itemsize();
  auto* implementation = tensor.unsafeGetTensorImpl();
  auto& storage = implementation->unsafe_storage();
  if (storage.nbytes() < bytes) {
    auto larger = Memory::get().allocate(bytes);
    std::memcpy(larger.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
  implementation->set_sizes_and_strides(sizes, contiguous.strides());
  return tensor;
}

at::Tensor& set_storage(
    at::Tensor& tensor, at::Storage source, int64_t offset, at::IntArrayRef sizes, at::IntArrayRef strides) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  at::native::setStrided(tensor, sizes, strides, offset);
  return tensor;
}

// Memory is reused at once here, whichever stream still reads it.
void record_stream(at::Tensor&, c10::Stream) {}

// Attention takes the kernel that is all a T4 has; the CPU's fused one computes the same.
int64_t attention_kernel(
    const at::Tensor&,
    const at::Tensor&,
    const at::Tensor&,
    const std::optional<at::Tensor>&,
    double,
    bool,
    std::optional<double>,
    bool) {
  return static_cast<int64_t>(at::SDPBackend::efficient_attention);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> efficient_attention(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const std::optional<at::Tensor>& bias,
    bool,
    double dropout,
    bool is_causal,
    std::optional<double> scale) {
  journal.count("fused attention");
  const auto mask = bias ? std::optional(host_alias(*bias)) : std::nullopt;
  auto [out, log_sum] = at::_scaled_dot_product_flash_attention_for_cpu(
      host_alias(query), host_alias(key), host_alias(value), dropout, is_causal, mask, scale);
  const auto seed = at::empty({}, at::dtype(at::kLong).device(CARD));
  return {to_card(out), to_card(log_sum), seed, at::empty_like(seed)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> efficient_attention_backward(
    const at::Tensor& gradient,
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const at::Tensor& bias,
    const at::Tensor& out,
    const at::Tensor& log_sum,
    const at::Tensor&,
    const at::Tensor&,
    double dropout,
    std::array<bool, 4>,
    bool is_causal,
    std::optional<double> scale) {
  const auto mask = bias.defined() ? std::optional(host_alias(bias)) : std::nullopt;
  auto [to_query, to_key, to_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      host_alias(gradient), host_alias(query), host_alias(key), host_alias(value), host_alias(out),
      host_alias(log_sum), dropout, is_causal, mask, scale);
  return {to_card(to_query), to_card(to_key), to_card(to_value), at::Tensor()};
}

}  // namespace pretended

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::pretended::Hooks)
}
C10_REGISTER_GUARD_IMPL(CUDA, ::pretended::Guard);

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&pretended::on_the_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  using namespace pretended;
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy);
  library.impl("_local_scalar_dense", item);
  library.impl("as_strided", as_strided);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("view", view);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("record_stream", record_stream);
  library.impl("_scaled_dot_product_efficient_attention", efficient_attention);
  library.impl("_scaled_dot_product_efficient_attention_backward", efficient_attention_backward);
  // These have kernels for devices in general, which would be taken before the fallback.
  for (const auto* name : {"native_group_norm", "native_layer_norm", "silu_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
  for (const auto* name : {"convolution", "convolution_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&pretended::convolution>());
}

// On a card these are kernels; bitsandbytes' general ones are torch operators, whose results would take memory.
TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, library) {
  for (const auto* name : {"quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&pretended::on_the_host>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace pretended;
  c10::SetAllocator(c10::DeviceType::CUDA, &Memory::get(), 100);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(attention_kernel);

  static auto& memory = Memory::get();
  module.def("allocated", [] { return memory.allocated.load(); });
  module.def("allocations", [] { return memory.allocations.load(); });
  module.def("peak", [] { return memory.peak.load(); });
  module.def("reset_peak", [] { memory.peak = memory.allocated.load(); });
  module.def("set_limit", [](int64_t bytes) { memory.limit = bytes; });
  module.def("set_cap", [](int64_t bytes) { memory.cap = bytes; });
  module.def("set_workspace", [](int64_t bytes) { memory.workspace = bytes; });
  module.def("limit", [] { return memory.limit.load(); });
  module.def("failures", [] { return memory.failures.load(); });
  module.def("fail_after", [](int64_t count, std::string message) { memory.fail_after(count, message); });
  module.def("counts", [] { return journal.counts(); });
  module.def("count", [](const std::string& event) { journal.count(event); });
  module.def("clear_counts", [] { journal.clear(); });
  module.def("default_generator", [] { return default_generator(); });
  module.def("current_stream", [] { return Streams::get().current; });
  module.def("set_stream", [](int64_t stream) { Streams::get().current = stream; });
  module.def("wait_for", [](int64_t stream) { Streams::get().wait_for(stream); });
  module.def("wait_for_all", [] { Streams::get().wait_for_all(); });
  module.attr("WAIT") = WAIT;
  module.attr("UPLOAD") = UPLOAD;
  module.attr("DOWNLOAD") = DOWNLOAD;
}
