# SPDX-License-Identifier: MIT
"""The bias over several processes: sequences in shards (context_parallel), heads in shards (tensor_parallel)."""
