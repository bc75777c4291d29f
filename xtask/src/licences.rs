//! Licences and sources of dependencies, by the lists of deny.toml: with cargo-deny where it is installed, else from
//! `cargo metadata`. (Advisories need cargo-deny, and its database from the network.)

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// What is wrong, one line each.
pub(crate) fn check(root: &Path) -> Vec<String> {
    let has_cargo_deny =
        Command::new("cargo").args(["deny", "--version"]).output().is_ok_and(|output| output.status.success());
    if has_cargo_deny {
        println!("tidy: cargo deny check licenses bans sources");
        let status =
            Command::new("cargo").current_dir(root).args(["deny", "check", "licenses", "bans", "sources"]).status();
        return if status.is_ok_and(|status| status.success()) {
            Vec::new()
        } else {
            vec!["`cargo deny` failed".to_owned()]
        };
    }
    println!("tidy: licences and sources by deny.toml (cargo-deny is not installed)");
    match violations(root) {
        Ok(violations) => violations,
        Err(error) => vec![format!("licences cannot be checked: {error}")],
    }
}

fn violations(root: &Path) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(root.join("deny.toml")).map_err(|error| error.to_string())?;
    let rules: toml::Table = text.parse().map_err(|error| format!("deny.toml: {error}"))?;
    let allowed = rules.get("licenses").and_then(|table| table.get("allow")).and_then(toml::Value::as_array);
    let allowed: Vec<&str> = allowed.into_iter().flatten().filter_map(toml::Value::as_str).collect();
    let output = Command::new("cargo").current_dir(root).args(["metadata", "--format-version", "1"]).output();
    let output = output.map_err(|error| error.to_string())?;
    let metadata: Value = serde_json::from_slice(&output.stdout).map_err(|error| format!("cargo metadata: {error}"))?;
    let mut violations = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or("?");
        let Some(source) = package["source"].as_str() else { continue };
        if !source.starts_with("registry+") {
            violations.push(format!("`{name}` comes from {source}, not from a registry"));
        }
        let licence = package["license"].as_str().unwrap_or("none given");
        if !permits(licence, &allowed) {
            violations.push(format!("`{name}` is under `{licence}`, which deny.toml does not allow"));
        }
    }
    Ok(violations)
}

/// Whether one choice of an SPDX expression is allowed: `A OR B` if either is, `A AND B` if both are. `/` is the old
/// way to write OR.
fn permits(expression: &str, allowed: &[&str]) -> bool {
    let expression = expression.trim();
    if allowed.contains(&expression) {
        return true;
    }
    for (operator, every) in [(" AND ", true), (" OR ", false), ("/", false)] {
        if let Some(parts) = split_outside_parentheses(expression, operator) {
            let mut parts = parts.into_iter().map(|part| permits(part, allowed));
            return if every { parts.all(|part| part) } else { parts.any(|part| part) };
        }
    }
    match expression.strip_prefix('(').and_then(|rest| rest.strip_suffix(')')) {
        Some(inner) => permits(inner, allowed),
        None => false,
    }
}

/// The parts between `operator`s that stand in no parentheses; `None` where there is no such operator.
fn split_outside_parentheses<'a>(text: &'a str, operator: &str) -> Option<Vec<&'a str>> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (index, character) in text.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ if depth == 0 && index >= start && text[index..].starts_with(operator) => {
                parts.push(&text[start..index]);
                start = index + operator.len();
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    (parts.len() > 1).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        let allowed = ["MIT", "Apache-2.0", "Unicode-3.0"];
        for (expression, expected) in [
            ("MIT", true),
            ("GPL-3.0", false),
            ("MIT OR GPL-3.0", true),
            ("MIT/GPL-3.0", true),
            ("(MIT OR GPL-3.0) AND Unicode-3.0", true),
            ("MIT AND GPL-3.0", false),
            ("(MIT OR Apache-2.0) AND GPL-3.0", false),
            ("none given", false),
        ] {
            assert_eq!(permits(expression, &allowed), expected, "{expression}");
        }
    }
}
