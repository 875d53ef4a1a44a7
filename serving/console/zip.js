// A ZIP file of files as they are: images are compressed already, and a table is small.

const encoder = new TextEncoder();
let table;

function crc32(bytes) {
  table ??= Uint32Array.from({ length: 256 }, (_, n) => {
    for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
    return n >>> 0;
  });
  let crc = ~0;
  for (const byte of bytes) crc = (crc >>> 8) ^ table[(crc ^ byte) & 255];
  return ~crc >>> 0;
}

/** The ZIP file (a Blob) of [{name, bytes}]; names are UTF-8. */
export function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, bytes } of files) {
    const path = encoder.encode(name);
    // Version 2.0, UTF-8 names, stored, 1 January 1980, CRC, size twice, length of the name.
    const common = [u16(20), u16(0x0800), u16(0), u16(0), u16(0x21), u32(crc32(bytes)), u32(bytes.length), u32(bytes.length), u16(path.length), u16(0)];
    const head = [u32(0x04034b50), ...common, path];
    directory.push(u32(0x02014b50), u16(20), ...common, u16(0), u16(0), u16(0), u32(0), u32(offset), path);
    parts.push(...head, bytes);
    offset += 30 + path.length + bytes.length;
  }
  const length = directory.reduce((sum, part) => sum + part.length, 0);
  const end = [u32(0x06054b50), u16(0), u16(0), u16(files.length), u16(files.length), u32(length), u32(offset), u16(0)];
  return new Blob([...parts, ...directory, ...end], { type: "application/zip" });
}

const u16 = (value) => Uint8Array.of(value, value >>> 8);
const u32 = (value) => Uint8Array.of(value, value >>> 8, value >>> 16, value >>> 24);
