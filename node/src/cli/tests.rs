use clap::CommandFactory as _;

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("sundara-node").chain(line.split_whitespace()))
}

#[test]
fn clap_finds_no_mistake() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_is_in_the_help_of_its_noun() {
    let mut cli = Cli::command();
    let help = cli.render_long_help().to_string();
    for (noun, verbs) in [
        ("testnet", &[][..]),
        ("key", &["new", "show"]),
        ("config", &["show"]),
        ("executor", &["invite", "list", "revoke"]),
        ("job", &["submit", "watch", "list", "cancel"]),
        ("model", &["publish", "list", "show", "fetch", "pin", "rm", "gc"]),
        ("reduce", &["bench", "bench-node"]),
        ("peers", &[]),
        ("status", &[]),
        ("attestation", &["verify"]),
    ] {
        assert!(help.contains(&format!("\n  {noun}")), "{noun} in\n{help}");
        let noun = cli.find_subcommand_mut(noun).unwrap();
        let known: Vec<String> = noun.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
        assert_eq!(known, verbs);
    }
    for (exit, meaning) in EXIT_CODES {
        assert!(help.contains(meaning), "exit code {} in\n{help}", exit as u8);
    }
}

#[test]
fn every_command_that_speaks_to_a_node_prints_json_and_names_the_api() {
    fn leaves(command: &clap::Command, path: String, found: &mut Vec<(String, Vec<String>)>) {
        // A hidden one is this program's own business.
        if command.is_hide_set() {
            return;
        }
        if command.get_subcommands().next().is_none() {
            let flags = command.get_arguments().filter_map(|arg| arg.get_long().map(str::to_owned)).collect();
            found.push((path.clone(), flags));
        }
        for sub in command.get_subcommands() {
            leaves(sub, format!("{path} {}", sub.get_name()), found);
        }
    }
    let mut found = Vec::new();
    leaves(&Cli::command(), String::new(), &mut found);
    assert!(found.len() > 15, "{found:?}");
    for (path, flags) in found {
        assert!(flags.iter().any(|flag| flag == "json"), "{path} has --json");
        let local = ["testnet", "key", "config", "attestation", "reduce"]
            .iter()
            .any(|noun| path.trim_start().starts_with(noun));
        assert!(local || flags.iter().any(|flag| flag == "api"), "{path} has --api");
        // A secret on a command line is in every process list and shell history.
        for flag in flags {
            assert!(
                !["secret", "seed-phrase", "phrase", "password", "token"].contains(&flag.as_str()),
                "{path} --{flag}"
            );
        }
    }
}

#[test]
fn the_flags_of_a_node_become_settings() {
    let cli = parse("--role validator,miner --data-dir /d --listen /ip4/1.2.3.4/tcp/1 --listen /ip4/1.2.3.4/tcp/2 --api 127.0.0.1:0 --log-level debug --log-format json").unwrap();
    assert!(cli.command.is_none());
    let sources = cli.node.sources(&cli.log).unwrap();
    let value = |key: &str| sources.flags.iter().find(|(k, ..)| *k == key).map(|(_, value, _)| value.to_string());
    assert_eq!(value("node.roles").unwrap(), r#"["validator","miner"]"#);
    assert_eq!(value("node.data_dir").unwrap(), r#""/d""#);
    assert_eq!(value("net.listen").unwrap(), r#"["/ip4/1.2.3.4/tcp/1","/ip4/1.2.3.4/tcp/2"]"#);
    assert_eq!(value("http.listen").unwrap(), r#""127.0.0.1:0""#);
    assert_eq!(value("log.level").unwrap(), r#""debug""#);
    assert_eq!(value("log.format").unwrap(), r#""json""#);
    assert_eq!(value("net.bootstrap"), None);

    assert!(parse("--role minor").unwrap_err().to_string().contains("miner"));
    assert!(parse("--miner /ip4/1.2.3.4/tcp/1 --validator /ip4/1.2.3.4/tcp/1").is_err());
}

#[test]
fn flags_stand_with_their_command() {
    assert!(matches!(
        parse("--log-level debug testnet --jobs 4 --exit --json").unwrap().command,
        Some(Command::Testnet(_))
    ));
    let stray = parse("--role miner status").unwrap();
    assert_eq!(dispatch(stray).unwrap_err().exit, Exit::Usage);
    assert!(parse("job submit").is_err(), "a model or --builtin is needed");
    assert!(parse("job submit a/b --builtin c").is_err());
    assert!(parse("job submit --builtin echo --replicas 17").is_err());
    assert!(parse("job submit --builtin echo --announce --wait").is_err());
    assert!(parse("job submit --builtin echo --input - --stream --proof p").is_ok());
}

#[test]
fn errors_say_each_thing_once() {
    let error = anyhow::anyhow!("inner").context("outer: inner").context("whole");
    assert_eq!(in_words(&CliError { exit: Exit::Failure, error }), "whole: outer: inner");
    let pipe: CliError = anyhow::Error::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe)).context("x").into();
    assert!(broken_pipe(&pipe));
}
