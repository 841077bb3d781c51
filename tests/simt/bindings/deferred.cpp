// SPDX-License-Identifier: Apache-2.0
// The host's side of deferred errors, as a struct the harness can fill in.
#include "kernels/deferred.h"

#include "bind.h"

struct DeferredRecord {
  int64_t* found;  // [3]: whether asking twice gives one record, and what is in it
};

template <>
void llmkern::cuda::run(const DeferredRecord& a, void*) {
  const DeferredError* error = deferred_error();
  a.found[0] = error == deferred_error();
  a.found[1] = error->mistake;
  a.found[2] = error->complete;
}

BIND((DeferredRecord), found)
BINDINGS
