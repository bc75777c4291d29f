//! Slurm's compact lists of nodes: `node[01-03,07],login`.

/// Most nodes that a list may name.
const MAX_NODES: usize = 65_536;

/// All nodes of a list, in order. Numbers keep their leading zeros; a name may have several brackets.
///
/// # Errors
/// What is wrong with the list, in words.
pub fn expand(list: &str) -> Result<Vec<String>, String> {
    let mut nodes = Vec::new();
    for name in split_outside_brackets(list)? {
        if name.is_empty() {
            return Err("has an empty name".to_owned());
        }
        let mut expanded = vec![String::new()];
        let mut rest = name;
        while let Some((before, after)) = rest.split_once('[') {
            let (inside, tail) = after.split_once(']').ok_or("has a `[` without `]`")?;
            let numbers = numbers(inside)?;
            if expanded.len().saturating_mul(numbers.len()) > MAX_NODES {
                return Err(format!("names more than {MAX_NODES} nodes"));
            }
            let with = |prefix: &String| {
                let prefix = format!("{prefix}{before}");
                numbers.iter().map(move |number| format!("{prefix}{number}")).collect::<Vec<_>>()
            };
            expanded = expanded.iter().flat_map(with).collect();
            rest = tail;
        }
        nodes.extend(expanded.into_iter().map(|prefix| prefix + rest));
        if nodes.len() > MAX_NODES {
            return Err(format!("names more than {MAX_NODES} nodes"));
        }
    }
    match nodes.iter().find(|node| !node.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))) {
        Some(odd) => Err(format!("names `{}`, which is no host name", odd.escape_debug())),
        None => Ok(nodes),
    }
}

fn split_outside_brackets(list: &str) -> Result<Vec<&str>, String> {
    let (mut names, mut start, mut inside) = (Vec::new(), 0, false);
    for (index, character) in list.char_indices() {
        match character {
            '[' if inside => return Err("has a `[` within brackets".to_owned()),
            '[' => inside = true,
            ']' if !inside => return Err("has a `]` without `[`".to_owned()),
            ']' => inside = false,
            ',' if !inside => {
                names.push(&list[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    names.push(&list[start..]);
    Ok(names)
}

fn numbers(inside: &str) -> Result<Vec<String>, String> {
    let mut numbers = Vec::new();
    for part in inside.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            let is_number = !text.is_empty() && text.len() <= 9 && text.bytes().all(|byte| byte.is_ascii_digit());
            let parsed = if is_number { text.parse::<usize>().ok() } else { None };
            parsed.ok_or_else(|| format!("has `{}` within brackets, which is no number or range", part.escape_debug()))
        };
        let (low, high) = (number(first)?, number(last)?);
        if high < low {
            return Err(format!("has the range `{part}`, which runs backwards"));
        }
        if high - low >= MAX_NODES || numbers.len() + (high - low) >= MAX_NODES {
            return Err(format!("names more than {MAX_NODES} nodes"));
        }
        numbers.extend((low..=high).map(|number| format!("{number:0width$}", width = first.len())));
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_expand_in_order() {
        for (list, nodes) in [
            ("node1", "node1"),
            ("node[01-03,07]", "node01 node02 node03 node07"),
            ("node[9-11]", "node9 node10 node11"),
            ("a,b[1-2],c", "a b1 b2 c"),
            ("rack[1-2]-node[08-10]", "rack1-node08 rack1-node09 rack1-node10 rack2-node08 rack2-node09 rack2-node10"),
            ("gpu[003].cluster.example", "gpu003.cluster.example"),
        ] {
            assert_eq!(expand(list).unwrap().join(" "), nodes);
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for list in [
            "",
            "a,,b",
            "a[",
            "a]",
            "a[1-2",
            "a[[1]]",
            "a[1-2]]",
            "a[x]",
            "a[]",
            "a[1-]",
            "a[3-1]",
            "a[1-99999999]",
            "a b",
            "a;reboot",
            "a[0-65535][0-65535]",
            "a[1234567890]",
        ] {
            assert!(expand(list).is_err(), "{list} was accepted");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(list in "[a-c0-9,\\[\\]-]{0,40}") {
            let _ = expand(&list);
        }

        #[test]
        fn ranges_hold_every_number_once(
            prefix in "[a-z]{1,8}", low in 0_usize..3000, length in 0_usize..60, width in 1_usize..6,
        ) {
            let high = low + length;
            let list = format!("{prefix}[{low:0width$}-{high:0width$}]");
            let nodes = expand(&list).unwrap();
            // Numbers are as wide as the first one is written.
            let expected: Vec<String> = (low..=high).map(|number| format!("{prefix}{number:0width$}")).collect();
            prop_assert_eq!(nodes, expected);
        }
    }
}
