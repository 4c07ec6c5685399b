// What torch asks of a device besides operators: guard, generators, hooks, and streams whose copies come late.
#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <deque>
#include <functional>
#include <map>

#include "memory.h"

namespace pretended {

// Copies between the card and pinned memory that nobody has waited for yet, by stream; 0 is the default stream.
// They are made when somebody waits, and no sooner: who reads before sees what was there.
class Streams {
 public:
  static Streams& get() {
    static Streams& streams = *new Streams();
    return streams;
  }

  void later(std::function<void()> copy) { pending_[current].push_back(std::move(copy)); }

  void wait_for(int64_t stream) {
    auto copies = std::move(pending_[stream]);
    pending_[stream].clear();
    for (auto& copy : copies) copy();
  }

  void wait_for_all() {
    for (auto& entry : pending_) wait_for(entry.first);
  }

  int64_t current = 0;

 private:
  std::map<int64_t, std::deque<std::function<void()>>> pending_;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Device = c10::Device;
  using Stream = c10::Stream;
  static Stream stream() { return Stream(Stream::DEFAULT, CARD); }

  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return CARD; }
  Device getDevice() const override { return CARD; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int = 0) const override { return stream(); }
  Stream exchangeStream(Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { Streams::get().wait_for_all(); }
};

// Random numbers of the card are those of a CPU generator of its own: equal seeds give a CPU's values.
struct Generator final : c10::GeneratorImpl {
  Generator() : c10::GeneratorImpl(CARD, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}

  void set_current_seed(uint64_t seed) override { twin.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return twin.current_seed(); }
  uint64_t seed() override { return twin.seed(); }
  void set_state(const c10::TensorImpl& state) override { twin.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return twin.get_state().getIntrusivePtr(); }
  Generator* clone_impl() const override {
    auto* clone = new Generator();
    clone->twin = twin.clone();
    return clone;
  }

  at::Generator twin = at::detail::createCPUGenerator();
};

inline const at::Generator& default_generator() {
  static const at::Generator& generator = *new at::Generator(at::make_generator<Generator>());
  return generator;
}

inline at::Generator twin_of(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->twin;
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}

  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void deviceSynchronize(c10::DeviceIndex) const override { Streams::get().wait_for_all(); }
  at::Generator getNewGenerator(c10::DeviceIndex = -1) const override { return at::make_generator<Generator>(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex = -1) const override { return default_generator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &Memory::get(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &PinnedMemory::get(); }
  bool isPinnedPtr(const void* pointer) const override { return PinnedMemory::get().holds(pointer); }
};

}  // namespace pretended
