//! Compiles `kernels/*.cu` with nvcc, each into a fat binary for every architecture that the compiler knows, and lists
//! them for `include_bytes!`, and the architectures beside them. Without nvcc both lists are empty, and the crate answers
//! every request with how to get it.
//!
//! `COGVLM_CUDA=off` builds without kernels, `COGVLM_CUDA=require` makes a missing nvcc an error. nvcc is looked for in
//! `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, `/usr/local/cuda`, and in the Python environments on `PATH` and
//! `VIRTUAL_ENV` (PyPI's `nvidia-cuda-nvcc`).

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Architectures that get machine code of their own. 90a, not 90: `wgmma` needs it.
const ARCHITECTURES: [&str; 6] = ["80", "86", "89", "90a", "100", "120"];
/// The architecture whose PTX serves GPUs that come later.
const PTX_ARCHITECTURE: &str = "80";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for name in ["COGVLM_CUDA", "COGVLM_CUDA_ARCHITECTURES", "NVCC", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
    println!("cargo::rerun-if-changed={}", kernels.display());
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let setting = env::var("COGVLM_CUDA").unwrap_or_default();
    let (list, architectures) = match (setting.as_str(), find_nvcc()) {
        ("off", _) => (String::new(), Vec::new()),
        ("" | "require", Some(nvcc)) => {
            let architectures = architectures(&nvcc);
            (compile_all(&nvcc, &architectures, &kernels, &out), architectures)
        }
        ("", None) => {
            println!(
                "cargo::warning=no nvcc found: building for the CPU only (see docs/cuda.md; COGVLM_CUDA=require makes \
                 this an error)"
            );
            (String::new(), Vec::new())
        }
        ("require", None) => fail("COGVLM_CUDA=require, but no nvcc was found; docs/cuda.md says how to get one"),
        (other, _) => fail(&format!("COGVLM_CUDA={other}: it may be `off` or `require`")),
    };
    let list = format!(
        "pub(crate) static MODULES: &[(&str, &[u8])] = &[\n{list}];\n\
         pub(crate) static ARCHITECTURES: &[&str] = &{architectures:?};\n"
    );
    write(&out.join("modules.rs"), list.as_bytes());
}

/// Compiles every kernel that was not compiled as it is now; gives the lines of the list.
fn compile_all(nvcc: &Path, architectures: &[String], kernels: &Path, out: &Path) -> String {
    let sources = files(kernels, "cu");
    let flags = flags(nvcc, architectures);
    let compiler = format!("{}\n{}\n", answer(nvcc, "--version"), flags.join(" "));
    let includes: String = files(&kernels.join("include"), "cuh").iter().map(|path| read(path)).collect();
    let others = other_builds(out);
    let mut list = String::new();
    let mut waiting: Vec<(PathBuf, PathBuf, String)> = Vec::new();
    for source in &sources {
        let name = source.file_stem().and_then(|name| name.to_str()).expect("kernels have plain names");
        let fatbin = out.join(format!("{name}.fatbin"));
        let mut hasher = DefaultHasher::new();
        (read(source), &includes).hash(&mut hasher);
        let key = format!("{compiler}{:016x}\n", hasher.finish());
        if !is_built(&fatbin, &key) && !others.iter().any(|other| take_over(&other.join(name), &fatbin, &key)) {
            waiting.push((source.clone(), fatbin.clone(), key));
        }
        writeln!(list, "    ({name:?}, include_bytes!({:?})),", fatbin.display().to_string()).expect("memory");
    }
    let queue = std::sync::Mutex::new(waiting);
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..num_threads {
            scope.spawn(|| {
                loop {
                    let Some((source, fatbin, key)) = queue.lock().expect("no thread panics with the lock").pop()
                    else {
                        break;
                    };
                    let _ = fs::remove_file(fatbin.with_extension("key"));
                    compile(nvcc, &flags, &source, &fatbin);
                    write(&fatbin.with_extension("key"), key.as_bytes());
                }
            });
        }
    });
    list
}

/// Whether `fatbin` was made by the compiler and of the sources of `key`.
fn is_built(fatbin: &Path, key: &str) -> bool {
    fatbin.is_file() && fs::read_to_string(fatbin.with_extension("key")).is_ok_and(|text| text == key)
}

/// The directories where other builds of this crate write, of other profiles or by clippy: OUT_DIR is
/// TARGET/PROFILE/build/cogvlm-cuda-HASH/out.
fn other_builds(out: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let profiles = out.ancestors().nth(4).into_iter().flat_map(entries);
    let builds = profiles.flat_map(|profile| entries(&profile.join("build")));
    let is_ours = |build: &PathBuf| {
        build.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("cogvlm-cuda-"))
    };
    builds.filter(is_ours).map(|build| build.join("out")).filter(|other| other != out).collect()
}

/// Copies what another build made, where it is what this one would make.
fn take_over(other: &Path, fatbin: &Path, key: &str) -> bool {
    let other = other.with_extension("fatbin");
    let copy = |ending: &str| fs::copy(other.with_extension(ending), fatbin.with_extension(ending)).is_ok();
    // The key is there as long as it is true. Asked again after copying: the other build may have begun anew meanwhile.
    let _ = fs::remove_file(fatbin.with_extension("key"));
    is_built(&other, key) && copy("fatbin") && copy("ptxas") && is_built(&other, key) && copy("key")
}

/// The files in `folder` with this ending, by name.
fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| fail(&format!("{}: {error}", folder.display())));
    let paths = entries.flatten().map(|entry| entry.path());
    let mut paths: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|found| found == ending)).collect();
    paths.sort();
    paths
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| fail(&format!("{}: {error}", path.display())))
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap_or_else(|error| fail(&format!("{}: {error}", path.display())));
}

fn compile(nvcc: &Path, flags: &[String], source: &Path, fatbin: &Path) {
    let text = read(source);
    // Kernels for one architecture alone say so in their first line.
    let only = text.lines().next().and_then(|line| line.strip_prefix("// architectures: "));
    let wanted = |flag: &&String| {
        only.is_none_or(|only| !flag.starts_with("-gencode") || flag.ends_with(&format!("code=sm_{}", only.trim())))
    };
    let mut flags: Vec<&String> = flags.iter().filter(wanted).collect();
    let is_known = flags.iter().any(|flag| flag.starts_with("-gencode"));
    let empty = format!("-gencode=arch=compute_{PTX_ARCHITECTURE},code=compute_{PTX_ARCHITECTURE}");
    if !is_known {
        // Its kernels are empty then, and `ARCHITECTURES` says that nobody may ask for them.
        flags.push(&empty);
    }
    let output = Command::new(nvcc).args(&flags).arg(source).arg("-o").arg(fatbin).output();
    let output = output.unwrap_or_else(|error| fail(&format!("{}: {error}", nvcc.display())));
    let log = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        fail(&format!("{} cannot compile {}:\n{log}", nvcc.display(), source.display()));
    }
    // What the assembler says of registers and spills: `cargo xtask kernels` reads it.
    write(&fatbin.with_extension("ptxas"), log.as_bytes());
}

/// What the compiler prints for `flag`.
fn answer(nvcc: &Path, flag: &str) -> String {
    let output = Command::new(nvcc).arg(flag).output();
    let output = output.unwrap_or_else(|error| fail(&format!("{}: {error}", nvcc.display())));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The architectures to make machine code for: those asked for that this compiler knows.
fn architectures(nvcc: &Path) -> Vec<String> {
    let known = answer(nvcc, "--list-gpu-code");
    let known: Vec<&str> = known.split_whitespace().collect();
    let asked = env::var("COGVLM_CUDA_ARCHITECTURES").ok();
    let wanted = asked.clone().unwrap_or_else(|| ARCHITECTURES.join(","));
    // 90a is not listed by older compilers, though they know it where they know 90.
    let is_known = |name: &&str| known.contains(&format!("sm_{}", name.trim_end_matches('a')).as_str());
    let (found, unknown): (Vec<&str>, Vec<&str>) =
        wanted.split(',').map(str::trim).filter(|name| !name.is_empty()).partition(is_known);
    if asked.is_some() && !unknown.is_empty() {
        let (unknown, known) = (unknown.join(","), known.join(", "));
        fail(&format!(
            "COGVLM_CUDA_ARCHITECTURES names {unknown}, which {} does not know: it has {known}",
            nvcc.display()
        ));
    }
    found.into_iter().map(str::to_owned).collect()
}

/// The flags for machine code of `architectures`, and PTX for others.
fn flags(nvcc: &Path, architectures: &[String]) -> Vec<String> {
    let mut flags: Vec<String> =
        ["-fatbin", "-O3", "-std=c++17", "-Xptxas=-v", "--threads=1"].map(str::to_owned).into();
    for architecture in architectures {
        flags.push(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
    }
    flags.push(format!("-gencode=arch=compute_{PTX_ARCHITECTURE},code=compute_{PTX_ARCHITECTURE}"));
    // Every executable with the kernels holds all of them: a fifth of the size, where the compiler can.
    if answer(nvcc, "--help").contains("--compress-mode") {
        flags.push("--compress-mode=size".to_owned());
    }
    flags
}

/// nvcc by its real path: called through a link it looks for its files beside the link.
fn find_nvcc() -> Option<PathBuf> {
    let given = env::var_os("NVCC").map(PathBuf::from);
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let homes = homes.map(|home| PathBuf::from(home).join("bin/nvcc"));
    let paths: Vec<PathBuf> = env::var_os("PATH").map(|paths| env::split_paths(&paths).collect()).unwrap_or_default();
    let on_path = paths.iter().map(|folder| folder.join("nvcc"));
    let usual = [PathBuf::from("/usr/local/cuda/bin/nvcc")];
    let environments = env::var_os("VIRTUAL_ENV").map(PathBuf::from).into_iter();
    let environments = environments.chain(paths.iter().filter_map(|folder| folder.parent().map(Path::to_owned)));
    let wheels = environments.flat_map(|environment| {
        let libraries = fs::read_dir(environment.join("lib")).into_iter().flatten().flatten();
        let pythons = libraries.map(|entry| entry.path()).filter(|path| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("python3"))
        });
        pythons.flat_map(|python| ["site-packages", "dist-packages"].map(|folder| python.join(folder)))
    });
    let wheels = wheels.map(|packages| packages.join("nvidia/cu13/bin/nvcc"));
    let candidates = given.into_iter().chain(homes).chain(on_path).chain(usual).chain(wheels);
    candidates.filter(|path| path.is_file()).find_map(|path| path.canonicalize().ok())
}

#[expect(clippy::print_stderr, clippy::exit, reason = "how a build script refuses")]
fn fail(message: &str) -> ! {
    println!("cargo::error={}", message.replace('\n', "%0A"));
    eprintln!("{message}");
    std::process::exit(1)
}
