// A device guard for CUDA that does nothing: a build of torch without CUDA has none, and indexing
// a tensor that says it is on a CUDA device asks for one.
#include <c10/core/impl/DeviceGuardImplInterface.h>

struct PretendedGuard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, PretendedGuard);
}
