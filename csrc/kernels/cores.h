// SPDX-License-Identifier: Apache-2.0
// How many cores this process may use at once. Workers that wait for each other at a barrier must not be more: each
// would wait until the system takes the core from another one.
#pragma once

namespace llmkern {

// At least 1: the cores that the calling thread may run on, and no more than a control group's quota; or what
// LLMKERN_CORES says. Looked up again when a tenth of a second has passed, so it costs a few nanoseconds. Throws
// std::invalid_argument where LLMKERN_CORES is not a number above 0.
int usable_cores();

// ---- its parts, for tests

// The cores that the calling thread may run on.
int cores_of_affinity();

// The quota of the control group (versions 1 and 2) whose file systems and /proc/self/cgroup lie under `root`, rounded
// up; 0 for none.
int cores_of_quota(const char* root);

}  // namespace llmkern
