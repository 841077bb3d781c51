// SPDX-License-Identifier: Apache-2.0
// Prints the quota of the control group under the folder that is named; built by test_cores.py.
#include "kernels/cores.h"

#include <cstdio>

int main(int, char** arguments) { std::printf("%d", llmkern::cores_of_quota(arguments[1])); }
