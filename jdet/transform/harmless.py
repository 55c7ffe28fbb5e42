"""The primitives whose results no shape can change, and those that are known to be more.

Names, not objects: what a name says is public, where the object lives is not.
"""

# Moves, picks or makes elements; or computes each element from its own inputs by one
# correctly rounded or exact operation; or is exact in any order (integers, truth values, the
# lowest index of an extreme).
EXACT = frozenset(
    """
    abs add add_any add_jaxvals after_all and argmax argmin axis_index bitcast_convert_type
    broadcast_in_dim broadcast_to ceil clamp clz complex concatenate conj convert_element_type
    copy copy_p create_token dce_sink device_put dim_as_value dimension_size dynamic_slice
    dynamic_update_slice empty empty2 eq eq_to expand_dims floor from_edtype gather ge gt imag
    iota is_finite layout_constraint le le_to lt lt_to max min mul mulhi name ne neg nextafter
    not optimization_barrier or pad platform_index population_count pvary real reduce_precision
    rem reshape reshard rev round select_n sharding_constraint shift_left
    shift_right_arithmetic shift_right_logical sign slice split sqrt squeeze stack
    stop_gradient sub tie tile to_edtype transpose unstack vary_unreduced_cast_p
    reduced_vary_cast_p with_memory_space_constraint xor square integer_pow one_minus_square
    lu_pivots_to_permutation shape_assertion pin unpin create_linear scatter
    """.split()
)

# Elementwise, by a series that XLA writes out: no vector routine with another one for the tail
# was seen on a CPU (the random programs of scripts/check_transform.py hold most of them).
SERIES = frozenset(
    """
    acos acosh asin asinh atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf erf_inv
    erfc exp2 expm1 igamma igamma_grad_a igammac lgamma log1p log2 polygamma pow
    regularized_incomplete_beta rsqrt sin sinh tan zeta
    """.split()
)

# Float arithmetic that is rounded to a 16-bit dtype: XLA computes it in float32 and may drop
# the rounding where a fusion meets a conversion back.
ROUNDED = SERIES | frozenset(
    """
    add add_any add_jaxvals atan convert_element_type exp integer_pow log logistic mul
    nextafter one_minus_square rem sqrt square sub tanh
    """.split()
)

# What ends in a product, or may. LLVM contracts a product into a sum that follows (an FMA, one
# rounding for two), and whether it does, or which of two products it takes, depends on what else
# the fusion holds.
PRODUCTS = SERIES | frozenset("mul square integer_pow one_minus_square".split())

# What a Hopper card computes in 16 bits, by one correctly rounded (or exact) instruction.
INSTRUCTIONS = frozenset("add add_any add_jaxvals sub mul max min select_n".split())

# Exact, but their transposes or derivatives sum: twins, so that those sums have a fixed tree.
SUMMED_BACKWARD = frozenset(
    """
    broadcast_in_dim broadcast_to gather pad scatter sort top_k cummax cummin
    """.split()
)

# Elementwise with several operands: where one is broadcast, by the user or by `jax.vmap`, the
# transpose sums over the axes that it lacked.
BROADCASTING = frozenset(
    """
    add add_any add_jaxvals atan2 clamp complex max min mul nextafter pow rem select_n sub
    """.split()
)

# Draws: what an element gets depends on its place in the shape drawn.
RANDOM = frozenset(
    """
    random_bits threefry2x32 threefry4x32 philox2x32 philox4x32 rng_bit_generator rng_uniform
    random_gamma random_split random_seed random_wrap random_unwrap random_clone
    random_fold_in iota_2x32_shape
    """.split()
)

# Of those, the ones that only make or pass keys.
KEYS = frozenset(
    "random_seed random_wrap random_unwrap random_clone random_fold_in iota_2x32_shape".split()
)

COLLECTIVES = frozenset(
    """
    all_gather all_gather_invariant all_to_all pmax pmin ppermute psum psum2 psum_invariant
    ragged_all_to_all reduce_scatter unreduced_psum unreduced_reduce_scatter
    """.split()
)

# Code that a trace cannot see into.
OPAQUE = frozenset(
    """
    call_exported custom_partitioning debug_callback debug_print ffi_call io_callback
    pallas_call pure_callback core_map mosaic_gpu tpu_custom_call
    """.split()
)

# One library call a matrix; the batch is the library's loop.
LINALG = frozenset(
    """
    cholesky cholesky_update eig eigh geqrf hessenberg householder_product lu ormqr qr schur svd
    symmetric_product tridiagonal tridiagonal_solve triangular_solve fft
    """.split()
)
