// The kernels as calls of XLA's foreign function interface.
//
//   jaxbn_moments          x, weights -> mean, rest, squares
//   jaxbn_cotangents       dy, x, weights, mean -> first, second
//   jaxbn_input_cotangent  dy, x, weights, mean, k, c1, c0 -> dx
//
// x and dy have (outer, channels, inner) elements, weights (outer, inner) or none, and the
// vectors (channels), in any number of axes. x and dy are float32 or bfloat16, dx is as x,
// all else float32.

#include "cotangents.h"
#include "input_cotangent.h"
#include "moments.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Floats = ffi::Buffer<ffi::F32>;

// The shape of `x`, which the other arrays must have been checked to have.
jaxbn::Shape shape_of(const ffi::AnyBuffer& x, int64_t channels, int64_t inner) {
  const int64_t slab = channels * inner;
  return {slab ? static_cast<int64_t>(x.element_count()) / slab : 0, channels, inner};
}

const float* data_or_null(const Floats& weights) {
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

ffi::Error moments(ffi::ThreadPool pool, ffi::AnyBuffer x, Floats weights,
                   ffi::Result<Floats> mean, ffi::Result<Floats> rest,
                   ffi::Result<Floats> squares, int64_t channels, int64_t inner) {
  const jaxbn::Shape shape = shape_of(x, channels, inner);
  return with_type(x, [&](const auto* data) {
    jaxbn::moments(data, data_or_null(weights), shape, mean->typed_data(),
                   rest->typed_data(), squares->typed_data(), pool);
    return ffi::Error::Success();
  });
}

ffi::Error cotangents(ffi::ThreadPool pool, ffi::AnyBuffer dy, ffi::AnyBuffer x,
                      Floats weights, Floats mean, ffi::Result<Floats> first,
                      ffi::Result<Floats> second, int64_t channels, int64_t inner) {
  const jaxbn::Shape shape = shape_of(x, channels, inner);
  return with_type(x, [&](const auto* x_data) {
    return with_type(dy, [&](const auto* dy_data) {
      jaxbn::cotangents(dy_data, x_data, data_or_null(weights), mean.typed_data(), shape,
                        first->typed_data(), second->typed_data(), pool);
      return ffi::Error::Success();
    });
  });
}

ffi::Error input_cotangent(ffi::ThreadPool pool, ffi::AnyBuffer dy, ffi::AnyBuffer x,
                           Floats weights, Floats mean, Floats k, Floats c1, Floats c0,
                           ffi::Result<ffi::AnyBuffer> dx, int64_t channels,
                           int64_t inner) {
  const jaxbn::Shape shape = shape_of(x, channels, inner);
  const float* vectors[] = {mean.typed_data(), k.typed_data(), c1.typed_data(),
                            c0.typed_data()};
  return with_type(x, [&](auto* x_data) {
    return with_type(dy, [&](const auto* dy_data) {
      jaxbn::input_cotangent(dy_data, x_data, data_or_null(weights), vectors, shape,
                             static_cast<decltype(x_data)>(dx->untyped_data()), pool);
      return ffi::Error::Success();
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxbn_moments, moments,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("channels")
                                  .Attr<int64_t>("inner"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxbn_cotangents, cotangents,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("channels")
                                  .Attr<int64_t>("inner"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxbn_input_cotangent, input_cotangent,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("channels")
                                  .Attr<int64_t>("inner"));
