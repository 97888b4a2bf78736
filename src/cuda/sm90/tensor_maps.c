/* SPDX-License-Identifier: MIT */
#include "cuda/sm90/tensor_maps.h"

#include "cuda/chunks.h"

typedef CUresult (*encode_function)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                    const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                                    CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                    CUtensorMapFloatOOBfill);

enum { RANK = 4, PANEL = 64, PIECE = 16 /* channels brought, and taken away */, ALIGNMENT = 16 };

/* The driver's function, asked for once at run time: the library is not linked with the driver. */
static encode_function find_encode(void) {
    static _Atomic(encode_function) known;
    encode_function encode = known;
    if (encode)
        return encode;
    void *found = NULL;
    enum cudaDriverEntryPointQueryResult status;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status) ||
        status != cudaDriverEntryPointSuccess)
        return NULL;
    known = encode = (encode_function)found;
    return encode;
}

bool kda_sm90_can_make_maps(void) { return find_encode(); }

static bool map(encode_function encode, const struct kda_tensor *t, cuuint32_t channels,
                CUtensorMapSwizzle swizzle, CUtensorMap *result) {
    cuuint64_t sizes[RANK], strides[RANK - 1];
    const int order[RANK] = {3, 2, 1, 0};
    for (int i = 0; i < RANK; i++) {
        int64_t size = t->shape[order[i]], stride = t->stride[order[i]];
        sizes[i] = (cuuint64_t)size;
        if (i > 0) /* a dimension of one element may come with any stride */
            strides[i - 1] = size > 1 ? (cuuint64_t)stride : ALIGNMENT;
    }
    const cuuint32_t box[RANK] = {channels, 1, KDA_CUDA_CHUNK, 1}, steps[RANK] = {1, 1, 1, 1};
    return encode(result, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, RANK, t->data, sizes, strides, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

cudaError_t kda_sm90_map(const struct kda_prefill *p, struct kda_sm90_maps *maps) {
    encode_function encode = find_encode();
    if (!encode)
        return cudaErrorNotSupported;
    bool good = map(encode, &p->q, PANEL, CU_TENSOR_MAP_SWIZZLE_128B, &maps->q) &&
                map(encode, &p->k, PANEL, CU_TENSOR_MAP_SWIZZLE_128B, &maps->k) &&
                map(encode, &p->v, PANEL, CU_TENSOR_MAP_SWIZZLE_128B, &maps->v) &&
                map(encode, &p->g, PANEL, CU_TENSOR_MAP_SWIZZLE_128B, &maps->g) &&
                map(encode, &p->out, PIECE, CU_TENSOR_MAP_SWIZZLE_32B, &maps->out);
    return good ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t kda_sm90_map_backward(const struct kda_backward *b, struct kda_sm90_backward_maps *maps) {
    encode_function encode = find_encode();
    if (!encode)
        return cudaErrorNotSupported;
    const struct kda_prefill *p = &b->forward;
    const struct kda_tensor *tensors[] = {&p->q,  &p->k,  &p->v,  &p->g, &b->d_out,
                                          &b->dq, &b->dk, &b->dv, &b->dg};
    CUtensorMap *results[] = {&maps->q,  &maps->k,  &maps->v,  &maps->g, &maps->d_out,
                              &maps->dq, &maps->dk, &maps->dv, &maps->dg};
    bool good = true;
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        good = good && map(encode, tensors[i], PANEL, CU_TENSOR_MAP_SWIZZLE_128B, results[i]);
    return good ? cudaSuccess : cudaErrorInvalidValue;
}
