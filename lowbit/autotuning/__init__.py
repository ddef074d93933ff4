"""Choices by measured time: `lb.autotune` makes a `Cache`, `lb.tuned` uses it, and what is measured is kept in a file.

Where a product is compiled, its fastest way is looked up in the cache of `lb.tuned`, then in the user's file, then in
what comes with lowbit for measured devices. What none of them has follows `--lowbit_on_cache_miss`.
"""

from lowbit.autotuning.cache import Cache as Cache
from lowbit.autotuning.cache import CacheError as CacheError
from lowbit.autotuning.cache import Entry as Entry
from lowbit.autotuning.cache import load as load
from lowbit.autotuning.lookup import CacheMissError as CacheMissError
from lowbit.autotuning.lookup import tuned as tuned
from lowbit.autotuning.search import AutotuneError as AutotuneError
from lowbit.autotuning.search import autotune as autotune
