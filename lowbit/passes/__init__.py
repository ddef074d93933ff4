"""The algebra: passes from terms to equal terms (numpy only), and the lowerings (`lower_*`, which import jax)."""

from lowbit.passes.bucket import bucket as bucket
from lowbit.passes.bucket import bucket_shared as bucket_shared
from lowbit.passes.choose import Form as Form
from lowbit.passes.choose import Machine as Machine
from lowbit.passes.choose import choose as choose
from lowbit.passes.choose import forms as forms
from lowbit.passes.commute_bucket import commute_bucket as commute_bucket
from lowbit.passes.commute_gather import commute_gather as commute_gather
from lowbit.passes.commute_gather import commute_gather_shared as commute_gather_shared
from lowbit.passes.distribute import distribute as distribute
from lowbit.passes.distribute import distribute_stored as distribute_stored
from lowbit.passes.flatten import flatten as flatten
from lowbit.passes.fold import fold as fold
from lowbit.passes.hoist_merge import hoist_merge as hoist_merge
from lowbit.passes.hoist_slice import hoist_slice as hoist_slice
from lowbit.passes.join_planes import join_planes as join_planes
from lowbit.passes.pipeline import PIPELINES as PIPELINES
from lowbit.passes.pipeline import Pass as Pass
from lowbit.passes.pipeline import run as run
from lowbit.passes.split_index import split_index as split_index
from lowbit.passes.tabulate import tabulate as tabulate
