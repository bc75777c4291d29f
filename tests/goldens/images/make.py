"""Writes the pictures beside it and manifest.json: what Pillow 10.1.0 makes of each with convert("RGB").

Needs Pillow==10.1.0 numpy. What Pillow cannot write is put together here, byte by byte.
"""
import hashlib, io, json, pathlib, struct, zlib
import numpy as np
from PIL import Image, PngImagePlugin

here = pathlib.Path(__file__).resolve().parent
W, H = 37, 21
rng = np.random.default_rng(3)
yy, xx = np.mgrid[0:H, 0:W]
rgb = np.stack([xx * 255 // (W - 1), yy * 255 // (H - 1), (xx * yy * 7) % 256], -1).astype(np.uint8)
rgb[5:12, 8:20] = rng.integers(0, 256, (7, 12, 3))
alpha = ((xx * 11 + yy * 5) % 256).astype(np.uint8)
alpha[3:6, 3:9] = 0
photo = np.asarray(Image.fromarray(rgb).resize((67, 43), Image.BICUBIC))       # smoother, and no multiple of 16
RGB, RGBA = Image.fromarray(rgb), Image.fromarray(np.dstack([rgb, alpha]))
GREY = Image.fromarray(rgb[..., 2])
LA = Image.merge("LA", (GREY, Image.fromarray(alpha)))
PALETTE = RGB.quantize(17)
files = {}


def save(name, image, **options):
    out = io.BytesIO()
    image.save(out, name.rsplit(".")[-1].replace("jpg", "jpeg").replace("tif", "tiff"), **options)
    files[name] = out.getvalue()


# ---- PNG
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, interlace=0, extra=b""):
    """rows: packed rows of every pass, in order."""
    body = zlib.compress(b"".join(b"\0" + r for r in rows), 9)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def packed(values, bits):
    stream = "".join(f"{v:0{bits}b}" for v in values)
    return bytes(int(stream[i:i + 8].ljust(8, "0"), 2) for i in range(0, len(stream), 8))


wide = (rgb.astype(np.uint16) << 8) | rng.integers(0, 256, rgb.shape, dtype=np.uint16)    # low bytes that rounding would carry
wide_alpha = (alpha.astype(np.uint16) << 8) | 200
be = lambda a: [r.astype(">u2").tobytes() for r in a]
save("rgb.png", RGB)
save("rgba.png", RGBA)
save("grey.png", GREY)
save("grey_alpha.png", LA)
save("bilevel.png", GREY.point(lambda v: 255 * (v > 128)).convert("1", dither=0))
save("palette.png", PALETTE)
save("palette_transparent.png", PALETTE, transparency=bytes(range(0, 255, 15)))
save("rgb_transparent.png", RGB, transparency=tuple(int(v) for v in rgb[0, 0]))
save("grey_transparent.png", GREY, transparency=0)
save("palette_2bit.png", RGB.quantize(4), bits=2)
files["grey_2bit.png"] = png(W, H, 2, 0, [packed(r >> 6, 2) for r in rgb[..., 0]])
files["grey_4bit.png"] = png(W, H, 4, 0, [packed(r >> 4, 4) for r in rgb[..., 0]])
files["rgb_16bit.png"] = png(W, H, 16, 2, be(wide))
files["rgba_16bit.png"] = png(W, H, 16, 6, be(np.dstack([wide, wide_alpha])))
files["grey_alpha_16bit.png"] = png(W, H, 16, 4, be(np.dstack([wide[..., :1], wide_alpha])))
files["grey_16bit.png"] = png(W, H, 16, 0, be(wide[..., 0]))
passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
files["interlaced.png"] = png(W, H, 8, 2, [r.tobytes() for x, y, dx, dy in passes for r in rgb[y::dy, x::dx]], 1)
exif = Image.Exif()
exif[0x0112] = 6
save("rotated_by_exif.png", RGB, exif=exif)

# ---- JPEG
save("quarter_chroma.jpg", Image.fromarray(photo), quality=90, subsampling=2)
save("half_chroma.jpg", Image.fromarray(photo), quality=90, subsampling=1)
save("full_chroma.jpg", Image.fromarray(photo), quality=92, subsampling=0)
save("progressive.jpg", Image.fromarray(photo), quality=90, subsampling=2, progressive=True)
save("grey.jpg", Image.fromarray(photo[..., 1]), quality=90)
save("rotated_by_exif.jpg", Image.fromarray(photo), quality=85, exif=exif)
inks = 255 - np.dstack([photo, photo.min(-1) // 2])
save("cmyk.jpg", Image.fromarray(inks, "CMYK"), quality=95)
cmyk = files["cmyk.jpg"]
adobe = cmyk.index(b"\xff\xee\x00\x0eAdobe")
files["ycck.jpg"] = cmyk[:adobe + 15] + b"\x02" + cmyk[adobe + 16:]
files["cmyk_without_adobe.jpg"] = cmyk[:adobe] + cmyk[adobe + 16:]
plain = files["full_chroma.jpg"]
jfif = plain.index(b"\xff\xe0")
no_jfif = plain[:jfif] + plain[jfif + 18:]
files["rgb_by_adobe.jpg"] = no_jfif[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00" + no_jfif[2:]
named = bytearray(no_jfif)
sof, sos = named.index(b"\xff\xc0"), named.index(b"\xff\xda")
for i, letter in enumerate(b"RGB"):
    named[sof + 10 + 3 * i] = letter
    named[sos + 5 + 2 * i] = letter
files["rgb_by_names.jpg"] = bytes(named)

# ---- WebP
save("lossy.webp", Image.fromarray(photo), quality=80)
save("lossless.webp", RGB, lossless=True)
save("lossless_alpha.webp", RGBA, lossless=True, exact=True)
save("lossy_alpha.webp", RGBA, quality=80)
save("animated.webp", RGB, lossless=True, save_all=True, append_images=[Image.fromarray(rgb[::-1])], duration=100)

# ---- GIF
save("palette.gif", PALETTE)
save("flat.gif", PALETTE, interlace=0)
save("transparent.gif", PALETTE, transparency=3)
save("animated.gif", PALETTE, save_all=True, append_images=[Image.fromarray(rgb[::-1]).quantize(17)], duration=100)
gif = bytearray(files["transparent.gif"])
gif[6:10] = struct.pack("<HH", W + 6, H + 4)
image_block = gif.index(b"\x2c\x00\x00\x00\x00" + struct.pack("<HH", W, H))
gif[image_block + 1:image_block + 5] = struct.pack("<HH", 2, 3)
files["frame_inside_screen.gif"] = bytes(gif)
gif[6:10] = struct.pack("<HH", W - 5, H - 2)
files["frame_beyond_screen.gif"] = bytes(gif)

# ---- BMP
save("rgb.bmp", RGB)
save("palette.bmp", PALETTE)
save("grey.bmp", GREY)
save("bilevel.bmp", GREY.convert("1"))
save("rgba.bmp", RGBA)
upside_down = bytearray(files["rgb.bmp"])
upside_down[22:26] = struct.pack("<i", -H)
files["top_down.bmp"] = bytes(upside_down)


def bmp(bits, compression, palette, body, height=H):
    offset = 54 + len(palette)
    head = struct.pack("<IiiHHIIiiII", 40, W, height, 1, bits, compression, len(body), 2835, 2835, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + head + palette + body


five = [(r[:, 0] >> 3).astype(int) << 10 | (r[:, 1] >> 3).astype(int) << 5 | r[:, 2] >> 3 for r in rgb[::-1]]
files["16bit.bmp"] = bmp(16, 0, b"", b"".join(r.astype("<u2").tobytes() + b"\0\0" * (W % 2) for r in five))
indices = np.asarray(PALETTE)
colours = b"".join(bytes(PALETTE.getpalette()[3 * i:3 * i + 3][::-1]) + b"\0" for i in range(17))


def run_lengths(row):
    out, start = b"", 0
    for i in range(1, len(row) + 1):
        if i == len(row) or row[i] != row[start]:
            out += bytes([i - start, row[start]])
            start = i
    return out + b"\0\0"


files["run_length.bmp"] = bmp(8, 1, colours, b"".join(run_lengths(r) for r in indices[::-1]) + b"\0\1")

# ---- TIFF
save("rgb.tif", RGB)
save("rgba.tif", RGBA)
save("grey.tif", GREY)
save("grey_alpha.tif", LA)
save("bilevel.tif", GREY.convert("1"))
save("palette.tif", PALETTE)
save("cmyk.tif", Image.fromarray(inks[:H, :W], "CMYK"))
save("grey_16bit.tif", Image.fromarray(wide[..., 0]))
save("float.tif", Image.fromarray(rgb[..., 0].astype(np.float32)))
for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
    save(f"{compression.removeprefix('tiff_')}.tif", RGB, compression=compression)
save("group4.tif", GREY.convert("1"), compression="group4")
save("jpeg.tif", Image.fromarray(photo), compression="jpeg", quality=90)


def tiff(order, bits, body, photometric=2, samples=3):
    entries = [(256, 3, W), (257, 3, H), (259, 3, 1), (262, 3, photometric), (273, 4, None), (277, 3, samples), (278, 3, H), (279, 4, len(body))]
    size = 8 + 2 + 12 * (len(entries) + 1) + 4
    out = (b"MM" if order == ">" else b"II") + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", len(entries) + 1)
    for tag, kind, value in sorted(entries + [(258, 3, "bits")]):
        if value == "bits":
            out += struct.pack(order + "HHII", 258, 3, samples, size)
        elif kind == 3:
            out += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
        else:
            out += struct.pack(order + "HHII", tag, 4, 1, size + 2 * samples if value is None else value)
    return out + b"\0\0\0\0" + struct.pack(order + "H", bits) * samples + body


files["rgb_16bit.tif"] = tiff("<", 16, wide.astype("<u2").tobytes())
files["big_endian.tif"] = tiff(">", 8, rgb.tobytes())
files["big_endian_16bit.tif"] = tiff(">", 16, wide.astype(">u2").tobytes())

# ---- what Pillow makes of them
for old in here.iterdir():
    if old.suffix in (".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"):
        old.unlink()
manifest = []
for name, data in files.items():
    (here / name).write_bytes(data)
    image = Image.open(io.BytesIO(data))
    mode = image.mode
    pixels = np.asarray(image.convert("RGB"))
    entry = {"file": name, "mode": mode, "width": pixels.shape[1], "height": pixels.shape[0], "rgb_sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}
    if name.endswith((".jpg", "jpeg.tif")) or name in ("16bit.bmp", "cmyk.tif"):
        entry["decoded_file"] = name + ".decoded.png"
        Image.fromarray(pixels).save(here / entry["decoded_file"], optimize=True)
    entry["resized"] = {}
    for size in (5, 21, 37, 56, 224):        # 37 and 21: one pass has nothing to do
        resized = Image.fromarray(pixels).resize((size, size), Image.BICUBIC)
        entry["resized"][size] = hashlib.sha256(resized.tobytes()).hexdigest()
    manifest.append(entry)
(here / "manifest.json").write_text("[\n" + ",\n".join(json.dumps(e) for e in manifest) + "\n]\n")
print(len(manifest), "pictures,", sum(f.stat().st_size for f in here.iterdir()), "bytes")
