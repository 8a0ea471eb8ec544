// The kernels as calls of XLA's foreign function interface.
//
//   jaxbn_moments     x (outer, channels, inner), weights (outer, inner) or empty
//                     -> mean, squares (channels)
//   jaxbn_cotangents  dy, x (outer, channels, inner), weights, mean (channels)
//                     -> first, second (channels)
//
// x and dy are float32 or bfloat16, all else float32.

#include "batch_norm.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Vector = ffi::BufferR1<ffi::F32>;
using Weights = ffi::BufferR2<ffi::F32>;

// The shape of `x`, which the other arrays must have been checked to have.
ffi::Error shape_of(const ffi::AnyBuffer& x, jaxbn::Shape* shape) {
  auto d = x.dimensions();
  if (d.size() != 3) return ffi::Error::InvalidArgument("x must have rank 3");
  *shape = {d[0], d[1], d[2]};
  return ffi::Error::Success();
}

const float* data_or_null(const Weights& weights) {
  return weights.element_count() ? weights.typed_data() : nullptr;
}

// Calls f, which returns an error, with the array's data as what it is.
template <class F>
ffi::Error with_type(const ffi::AnyBuffer& array, F f) {
  switch (array.element_type()) {
    case ffi::F32:
      return f(static_cast<float*>(array.untyped_data()));
    case ffi::BF16:
      return f(static_cast<jaxbn::BFloat16*>(array.untyped_data()));
    default:
      return ffi::Error::InvalidArgument("arrays must be float32 or bfloat16");
  }
}

ffi::Error moments(ffi::ThreadPool pool, ffi::AnyBuffer x, Weights weights,
                   ffi::Result<Vector> mean, ffi::Result<Vector> squares) {
  jaxbn::Shape shape;
  ffi::Error error = shape_of(x, &shape);
  if (error.failure()) return error;
  return with_type(x, [&](const auto* data) {
    jaxbn::moments(data, data_or_null(weights), shape, mean->typed_data(),
                   squares->typed_data(), pool);
    return ffi::Error::Success();
  });
}

ffi::Error cotangents(ffi::ThreadPool pool, ffi::AnyBuffer dy, ffi::AnyBuffer x,
                      Weights weights, Vector mean, ffi::Result<Vector> first,
                      ffi::Result<Vector> second) {
  jaxbn::Shape shape;
  ffi::Error error = shape_of(x, &shape);
  if (error.failure()) return error;
  return with_type(x, [&](const auto* x_data) {
    return with_type(dy, [&](const auto* dy_data) {
      jaxbn::cotangents(dy_data, x_data, data_or_null(weights), mean.typed_data(), shape,
                        first->typed_data(), second->typed_data(), pool);
      return ffi::Error::Success();
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxbn_moments, moments,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Weights>()
                                  .Ret<Vector>()
                                  .Ret<Vector>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxbn_cotangents, cotangents,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Weights>()
                                  .Arg<Vector>()
                                  .Ret<Vector>()
                                  .Ret<Vector>());
