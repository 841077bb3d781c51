// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "block.h"

namespace simt {

// Waits for every lane of the mask. The last one to come calls `finish` with the 32 lanes (null outside the mask): it
// finds each one's operand, and leaves results there.
using Finish = void (*)(Thread* const* lanes);
void collective(const char* operation, unsigned mask, void* operand, Finish finish, Site site);

}  // namespace simt
