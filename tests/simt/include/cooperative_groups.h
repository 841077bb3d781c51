// SPDX-License-Identifier: Apache-2.0
// The two cooperative groups the kernels use: the grid and the cluster.
#pragma once

#include "simt/device.h"

namespace cooperative_groups {

struct grid_group {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    simt::grid_barrier({file, line});
  }
};

struct cluster_group {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    simt::cluster_barrier({file, line});
  }
  unsigned block_rank() const { return simt::cluster_rank(); }
  unsigned num_blocks() const { return simt::cluster_size(); }
  template <class T>
  T* map_shared_rank(T* pointer, unsigned rank) const {
    return static_cast<T*>(simt::map_shared_rank(pointer, rank));
  }
};

inline grid_group this_grid() { return {}; }
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
