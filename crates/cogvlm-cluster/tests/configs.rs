//! The files of `configs/cluster` set what the program reads.

use std::path::{Path, PathBuf};
use std::process::Command;

use cogvlm_cluster::membership::Variables;
use cogvlm_cluster::{Explicit, Launcher, Options, membership};

fn config(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/cluster").join(name)
}

/// The manifest's variables: each `- name: N` that is followed by `value: V`.
fn manifest_variables(text: &str) -> Variables {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let pair = |pair: &[&str]| {
        let (name, value) = (pair[0].strip_prefix("- name: ")?, pair[1].strip_prefix("value: ")?);
        Some((name.to_owned(), value.trim_matches('"').to_owned()))
    };
    lines.windows(2).filter_map(pair).collect()
}

#[test]
fn pods_of_the_manifest_find_each_other() {
    let text = std::fs::read_to_string(config("kubernetes.yaml")).unwrap();
    let variables = manifest_variables(&text);
    assert_eq!(variables.len(), 4, "{variables:?}");
    let number = |key: &str| {
        let value = text.lines().find_map(|line| line.trim().strip_prefix(key)).unwrap();
        value.trim().parse::<usize>().unwrap()
    };
    assert_eq!(number("completions:"), number("parallelism:"));
    for index in 0..number("completions:") {
        let mut variables = variables.clone();
        // What Kubernetes sets in pods of a job called `cogvlm`.
        variables.insert("JOB_COMPLETION_INDEX".to_owned(), index.to_string());
        variables.insert("HOSTNAME".to_owned(), format!("cogvlm-{index}"));
        let place = membership(&Explicit::default(), &variables).unwrap();
        assert_eq!((place.rank, place.size, place.launcher), (index, number("completions:"), Launcher::Kubernetes));
        let port = text.lines().find_map(|line| line.trim().strip_prefix("- containerPort: ")).unwrap();
        assert_eq!(place.coordinator.unwrap().to_string(), format!("cogvlm-0.cogvlm:{port}"));
        let data_port = usize::from(Options::from_variables(&variables).unwrap().data_port) + index;
        assert!(text.contains(&format!("containerPort: {data_port}")), "{data_port}");
    }
}

#[test]
fn the_batch_file_is_a_script() {
    let output = Command::new("bash").arg("-n").arg(config("slurm.sbatch")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(config("slurm.sbatch")).unwrap();
    // Slurm reads its lines up to the first command.
    let directives = text.lines().take_while(|line| line.starts_with('#')).filter(|line| line.starts_with("#SBATCH "));
    assert_eq!(directives.count(), text.matches("#SBATCH ").count());
}
