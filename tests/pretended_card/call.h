// An operator called on the card and made by the CPU: its arguments become the host's, its results the card's.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <torch/library.h>

#include <set>

#include "device.h"

namespace pretended {

// What happened on the card: how often each operator ran, and what a card would not have taken.
class Journal {
 public:
  void count(const std::string& event) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++counts_[event];
  }

  std::map<std::string, int64_t> counts() {
    std::lock_guard<std::mutex> lock(mutex_);
    return counts_;
  }

  void clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    counts_.clear();
  }

 private:
  std::mutex mutex_;
  std::map<std::string, int64_t> counts_;
};

inline Journal journal;
constexpr auto WAIT = "wait of the host";
constexpr auto UPLOAD = "copy to the card";
constexpr auto DOWNLOAD = "copy to the host";

inline at::Tensor new_on_card(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_strided_generic(sizes, strides, &Memory::get(), keys, dtype);
}

// A CPU tensor over the memory of one on the card.
inline at::Tensor host_alias(const at::Tensor& tensor) {
  const auto options = tensor.options().device(at::kCPU);
  if (!tensor.has_storage() || tensor.storage().nbytes() == 0)
    return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  return at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(), options);
}

// A tensor on the card with the values and strides of one on the host.
inline at::Tensor to_card(const at::Tensor& tensor) {
  auto result = new_on_card(tensor.sizes(), tensor.strides(), tensor.scalar_type());
  if (tensor.numel() == 0) return result;
  const auto offset_bytes = tensor.storage_offset() * tensor.itemsize();
  const auto bytes = std::min(result.storage().nbytes(), tensor.storage().nbytes() - offset_bytes);
  std::memcpy(result.mutable_data_ptr(), tensor.const_data_ptr(), bytes);
  return result;
}

// As tensor cores do; and a CPU has quick kernels for fp32 alone.
inline const std::set<std::string> ADD_UP_IN_FP32 = {
    "aten::convolution", "aten::convolution_backward", "aten::mm", "aten::bmm", "aten::addmm"};

// One call of an operator: its arguments become the host's, its results the card's.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : schema_(op.schema()),
        name_(toString(op.operator_name())),
        stack_(stack),
        first_(stack->size() - op.schema().arguments().size()),
        adds_up_in_fp32_(ADD_UP_IN_FP32.count(op.operator_name().name) > 0) {}

  void lower_arguments() {
    for (auto place = first_; place < stack_->size(); ++place) lower((*stack_)[place]);
    TORCH_CHECK(
        !(sees_card_ && sees_host_),
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", name_, ")");
    // Without a generator, operators draw from their device's own.
    if (sees_card_ || is_for_card())
      for (const auto place : generators_) (*stack_)[place] = twin_of(default_generator());
  }

  void raise_results() {
    for (auto& [on_card, on_host, is_written] : lowered_) {
      if (!is_written) continue;
      const auto result = on_host.to(on_card.scalar_type());
      if (on_card.sizes() != result.sizes())
        resize_as(on_card, result);
      else if (was_half_)
        host_alias(on_card).copy_(result);
    }
    const auto first = stack_->size() - schema_.returns().size();
    for (auto place = first; place < stack_->size(); ++place) {
      auto& value = (*stack_)[place];
      if (value.isTensor()) {
        value = raised(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(raised(tensor));
        value = list;
      }
    }
  }

 private:
  struct Lowered {
    at::Tensor on_card;
    at::Tensor on_host;
    bool is_written;
  };

  void lower(c10::IValue& value) {
    const auto place = &value - stack_->data();
    const auto* alias = schema_.arguments()[place - first_].alias_info();
    const bool is_written = alias != nullptr && alias->isWrite();
    if (value.isTensor()) {
      value = lowered(value.toTensor(), is_written);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(lowered(tensor, is_written));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
        list.push_back(tensor ? std::optional(lowered(*tensor, is_written)) : std::nullopt);
      value = list;
    } else if (value.isDevice()) {
      device_ = value.toDevice();
      value = c10::Device(at::kCPU);
    } else if (value.isGenerator()) {
      const auto generator = value.toGenerator();
      TORCH_CHECK(
          generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu' (", name_, ")");
      value = twin_of(generator);
    } else if (value.isNone() && is_generator(place - first_)) {
      generators_.push_back(place);
    }
  }

  at::Tensor lowered(const at::Tensor& tensor, bool is_written) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      sees_host_ |= tensor.dim() > 0;  // numbers may come from the host
      return tensor;
    }
    sees_card_ = true;
    for (auto& each : lowered_) {
      if (!each.on_card.is_same(tensor)) continue;
      each.is_written |= is_written;
      return each.on_host;
    }
    auto on_host = host_alias(tensor);
    if (adds_up_in_fp32_ && tensor.scalar_type() == at::kHalf) {
      was_half_ = true;
      on_host = on_host.to(at::kFloat);
    }
    lowered_.push_back({tensor, on_host, is_written});
    return on_host;
  }

  at::Tensor raised(const at::Tensor& tensor) const {
    if (!tensor.defined() || !tensor.is_cpu()) return tensor;
    for (const auto& each : lowered_)
      if (each.on_host.is_same(tensor)) return each.on_card;
    if (was_half_) return to_card(tensor.to(at::kHalf));
    return sees_card_ || is_for_card() ? to_card(tensor) : tensor;
  }

  // An out argument that the CPU's operator has made larger, with memory of its own.
  static void resize_as(const at::Tensor& on_card, const at::Tensor& on_host) {
    const auto fresh = to_card(on_host);
    auto* implementation = on_card.unsafeGetTensorImpl();
    implementation->set_storage_keep_dtype(fresh.storage());
    implementation->set_sizes_and_strides(fresh.sizes(), fresh.strides(), 0);
  }

  bool is_generator(size_t index) const {
    return schema_.arguments()[index].type()->str().find("Generator") != std::string::npos;
  }

  bool is_for_card() const { return device_ && device_->is_cuda(); }

  const c10::FunctionSchema& schema_;
  const std::string name_;
  torch::jit::Stack* stack_;
  const size_t first_;
  std::vector<Lowered> lowered_;
  std::vector<size_t> generators_;
  std::optional<c10::Device> device_;
  const bool adds_up_in_fp32_;
  bool was_half_ = false;
  bool sees_card_ = false;
  bool sees_host_ = false;
};

inline void on_the_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  journal.count(toString(op.operator_name()));
  Call call(op, stack);
  call.lower_arguments();
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.raise_results();
}

}  // namespace pretended
