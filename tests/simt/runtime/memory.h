// SPDX-License-Identifier: Apache-2.0
// The device's memory: one range of addresses with wide empty space between buffers, so that an access beside a buffer
// is in no buffer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "shadow.h"

namespace simt {

constexpr unsigned char kFill = 0xff;  // what memory holds before it is written: NaN in every floating type, -1

// Around a block's dynamic shared memory: an access this close was meant for it. AddressSanitizer has its own way.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kSharedMargin = 0;
#else
constexpr size_t kSharedMargin = 4096;
#endif

// The buffer at or before this address, or null if the address is not in the device's memory.
bool in_device_memory(uintptr_t address);
Region* buffer_at(uintptr_t address);

}  // namespace simt
