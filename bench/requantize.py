"""Write a GGUF again with its matrices in another format. Run by bench/peers.py with the Python of
an environment that has the package gguf:

    python bench/requantize.py MODEL.gguf q4_0|q4_1|q8_0|bf16 OUTPUT.gguf

What the file says of itself and its tokenizer is kept, and so are vectors and learned positions.
The token embedding and the head are Q8_0 in a 4-bit file, as llama.cpp's own quantizer has a head
whose rows are no multiple of 256. (For others it takes Q6_K, which the package cannot write; with
``--pure`` it takes 4 bits there too.)
"""

from __future__ import annotations

import sys

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

HEADS = {"token_embd.weight", "output.weight"}


def main() -> None:
    source, name, output = sys.argv[1:]
    reader, kind = GGUFReader(source), Kind[name.upper()]
    writer = GGUFWriter(output, reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer, kind)
    for tensor in reader.tensors:
        values, stored = convert(tensor, kind)
        writer.add_tensor(tensor.name, values, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_metadata(reader, writer, kind: Kind) -> None:
    """All but what the writer writes by itself."""
    for name, field in reader.fields.items():
        if name == "general.file_type":
            writer.add_file_type(LlamaFileType[f"MOSTLY_{kind.name}"])
        elif not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), *field.types[:2])


def convert(tensor, kind: Kind) -> tuple[np.ndarray, Kind]:
    if len(tensor.shape) < 2 or tensor.name == "position_embd.weight":
        return tensor.data, tensor.tensor_type
    if tensor.name in HEADS and kind in (Kind.Q4_0, Kind.Q4_1):
        kind = Kind.Q8_0
    if tensor.tensor_type == kind:
        return tensor.data, kind
    return quantize(dequantize(tensor.data, tensor.tensor_type), kind), kind


if __name__ == "__main__":
    main()
